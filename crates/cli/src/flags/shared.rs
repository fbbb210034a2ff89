//! Options that several commands have, and texts about them.

use super::refusal::Refusal;
use super::spec::{Alias, Names, Value, both, long};
use super::{Flag, Stored};
use crate::text::number::{self, MAX_OFFSET};
use crate::{gate, objects};

/// The exit codes of most commands.
pub(crate) const EXIT_CODES: &[(u8, &str)] =
    &[(0, "success"), (1, "failure; a message gives the reason")];

/// The exit codes of commands that a signal can stop.
pub(crate) const STOPPABLE_EXIT_CODES: &[(u8, &str)] =
    &[(0, "success"), (1, "failure; a message gives the reason"), (130, "stopped by a signal")];

/// `--object`: defines a secret or another object.
pub(crate) const fn object<A>() -> Flag<A> {
    Flag::value(long("object").common(), Value::text("DEFINITION"), OBJECT, |_, definition| {
        if objects::print_help(&definition)? {
            return Err(Refusal::answered());
        }
        Ok(objects::define(&definition)?)
    })
}

/// The help of `--object`.
pub(crate) const OBJECT: &str = "define a secret or a throttle group that images refer to, for example secret,id=NAME,file=PATH; 'help' lists \
     the types, and 'TYPE,help' the properties of a type";

/// `--untrusted`: refuses images that refer to other files.
pub(crate) const fn untrusted<A>() -> Flag<A> {
    let about = "refuse images that refer to other files (backing file, data file)";
    Flag::switch_with(long("untrusted").in_full().common(), about, |_| {
        gate::refuse_other_files();
        Ok(())
    })
}

/// `-f`: the format of the image.
pub(crate) const fn format<A>(field: fn(&mut A) -> &mut Option<String>) -> Flag<A> {
    Flag::text(both('f', "format"), Value::FORMAT, FORMAT, field)
}

/// The help of an option for the format of an existing image.
pub(crate) const FORMAT: &str = "format of the image; without it, the format is probed";

/// `--image-opts`: the file name is a list of options.
pub(crate) const fn image_opts<A>(field: fn(&mut A) -> &mut bool) -> Flag<A> {
    let about = "FILENAME is a list of options, for example driver=qcow2,file.filename=disk.qcow2";
    Flag::switch(long("image-opts"), about, field)
}

/// `-U`: opens images to which other programs write.
pub(crate) const fn force_share<A>(field: fn(&mut A) -> &mut bool) -> Flag<A> {
    Flag::switch(both('U', "force-share"), "allow other programs to write to the image", field)
}

/// `-q`: prints errors only.
pub(crate) const fn quiet<A>(field: fn(&mut A) -> &mut bool) -> Flag<A> {
    Flag::switch(both('q', "quiet").common(), "print errors only", field)
}

/// `-p`: shows progress.
pub(crate) const fn progress<A>(field: fn(&mut A) -> &mut bool) -> Flag<A> {
    Flag::switch(both('p', "progress").common(), "show the progress", field)
}

/// A cache mode. The command parses the name of the mode later.
pub(crate) const fn cache<A>(letter: char, field: fn(&mut A) -> &mut Option<String>) -> Flag<A> {
    Flag::text(both(letter, "cache"), Value::CACHE.default("writeback"), "cache mode", field)
}

/// `--output`: prints text or JSON.
pub(crate) const fn output<A>(store: fn(&mut A, String) -> Stored) -> Flag<A> {
    output_as(long("output"), store)
}

/// `--output` of a command that has no such option in QEMU's tools.
pub(crate) const fn output_in_full<A>(store: fn(&mut A, String) -> Stored) -> Flag<A> {
    output_as(long("output").in_full(), store)
}

const fn output_as<A>(names: Names, store: fn(&mut A, String) -> Stored) -> Flag<A> {
    let value = Value::choice("human|json", &["human", "json"]);
    Flag::value(names, value.default("human"), "print text or JSON", store)
}

/// Stores the value of `--output`: whether the output is JSON.
pub(crate) fn set_json(json: &mut bool, text: &str) -> Stored {
    *json = match text {
        "json" => true,
        "human" => false,
        other => {
            let message = format!("--output expects 'human' or 'json' not '{other}'");
            return Err(Refusal::misused(message));
        }
    };
    Ok(())
}

/// `--threads`: the number of I/O threads.
pub(crate) const fn threads<A>(store: fn(&mut A, String) -> Stored) -> Flag<A> {
    let about = "number of I/O threads, from 1 to 64";
    Flag::value(
        long("threads").in_full(),
        Value::text("N").default("one per core, at most 16"),
        about,
        store,
    )
}

/// The value of `-o`: options of a new image, or options of an existing image to change.
pub(crate) const OPTIONS: Value = Value::text("LIST");

/// `-r`: a limit on the speed.
pub(crate) const fn rate<A>(store: fn(&mut A, String) -> Stored) -> Flag<A> {
    let names = both('r', "rate").aliases(&[Alias::FullWord("rate-limit")]);
    Flag::value(
        names,
        Value::size("BYTES").default("0"),
        "maximum number of bytes per second; 0: no limit",
        store,
    )
}

/// Stores the value of `-r`; `None`: no limit.
pub(crate) fn set_rate(rate: &mut Option<u64>, text: &str) -> Stored {
    let given = number::sized("rate limit", text, 0, MAX_OFFSET)?;
    *rate = Some(given).filter(|rate| *rate > 0);
    Ok(())
}
