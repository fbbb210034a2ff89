use super::{Found, Operands, Opt, Parser};

const HELP: usize = 0;
const QUIET: usize = 1;
const FORMAT: usize = 2;
const BACKING: usize = 3;
const BACKING_FORMAT: usize = 4;
const OUTPUT: usize = 5;
const X: usize = 6;

const fn opt(id: usize, short: Option<char>, long: Option<&'static str>, takes_value: bool) -> Opt {
    Opt { id, short, long, takes_value, in_full: false }
}

const TABLE: &[Opt] = &[
    opt(HELP, Some('h'), Some("help"), false),
    opt(QUIET, Some('q'), Some("quiet"), false),
    opt(FORMAT, Some('f'), Some("format"), true),
    opt(BACKING, Some('b'), Some("backing"), true),
    opt(BACKING_FORMAT, Some('F'), Some("backing-format"), true),
    opt(OUTPUT, None, Some("output"), true),
    opt(X, Some('x'), None, false),
];

fn run(arguments: &[&str]) -> (Vec<(usize, String)>, Vec<String>, Vec<String>) {
    let arguments = arguments.iter().map(|&a| a.to_owned());
    let mut parser = Parser::new("tool create", arguments, TABLE, Operands::Anywhere);
    let (mut found, mut faults) = (Vec::new(), Vec::new());
    loop {
        match parser.next() {
            Ok(Some(Found { id, value })) => found.push((id, value)),
            Ok(None) => return (found, parser.operands(), faults),
            Err(fault) => faults.push(fault.to_string()),
        }
    }
}

fn fault(arguments: &[&str]) -> String {
    run(arguments).2.remove(0)
}

#[test]
fn short_options_cluster_and_the_last_takes_the_rest_as_value() {
    let (found, operands, _) = run(&["-qxfraw", "a", "-f", "qcow2", "b"]);
    let expected = [(QUIET, ""), (X, ""), (FORMAT, "raw"), (FORMAT, "qcow2")];
    assert_eq!(found, expected.map(|(id, value)| (id, value.to_owned())));
    assert_eq!(operands, ["a", "b"]);
}

#[test]
fn long_options_may_be_abbreviated_to_an_unambiguous_prefix() {
    let (found, ..) = run(&["--out=json", "--qui", "--form", "raw", "--backing", "x"]);
    let expected = [(OUTPUT, "json"), (QUIET, ""), (FORMAT, "raw"), (BACKING, "x")];
    assert_eq!(found, expected.map(|(id, value)| (id, value.to_owned())));
}

#[test]
fn operands_mix_with_options_until_a_double_dash() {
    let (found, operands, _) = run(&["a", "-q", "-", "--", "-x", "--", "b"]);
    assert_eq!(found.len(), 1);
    assert_eq!(operands, ["a", "-", "-x", "--", "b"]);
}

#[test]
fn options_end_at_the_first_operand_with_end_options() {
    let arguments = ["-q", "create", "-x"].map(str::to_owned);
    let mut parser = Parser::new("tool", arguments, TABLE, Operands::EndOptions);
    assert_eq!(parser.next().unwrap().unwrap().id, QUIET);
    assert_eq!(parser.next().unwrap(), None);
    assert_eq!(parser.operands(), ["create", "-x"]);
}

#[test]
fn error_messages_equal_those_of_the_c_library() {
    assert_eq!(fault(&["-y"]), "tool create: invalid option -- 'y'");
    assert_eq!(fault(&["-f"]), "tool create: option requires an argument -- 'f'");
    assert_eq!(fault(&["--format"]), "tool create: option '--format' requires an argument");
    assert_eq!(fault(&["--bogus"]), "tool create: unrecognized option '--bogus'");
    assert_eq!(fault(&["--bogus=1"]), "tool create: unrecognized option '--bogus=1'");
    assert_eq!(fault(&["--quiet=1"]), "tool create: option '--quiet' doesn't allow an argument");
    assert_eq!(
        fault(&["--back", "x"]),
        "tool create: option '--back' is ambiguous; possibilities: '--backing' '--backing-format'"
    );
}

#[test]
fn an_empty_value_is_a_value() {
    let (found, ..) = run(&["--format=", "-f", ""]);
    assert_eq!(found, [(FORMAT, String::new()), (FORMAT, String::new())]);
}
