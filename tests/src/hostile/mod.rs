//! Corrupt images: damaged at random, or made by an attacker.
//!
//! A [`Case`] has a name, a way to corrupt a good image, and an expected result ([`Expect`]). Each case goes through every tool
//! of the program with bounded time and memory ([`through_the_program`]). In every case, a tool must end by itself, with an
//! exit code, without a panic, and with a one-line error if it fails. A new format adds tables of cases
//! ([`TestFormat::hostile`](crate::formats::TestFormat::hostile)); this module runs them.
//!
//! # Kinds of bad input, and the tests that cover them
//!
//! Names in quotes are cases of the tables in the submodules of the format ([`qcow2`], [`qcow2_tables`], [`qcow2_extra`],
//! [`qcow2_subclusters`], [`vdi`], [`parallels`], [`qed`], [`vpc`]). The tests
//! `formats::every_corrupt_image_gives_its_expected_result_1` to `_4` run these cases. [`mutate`]
//! (`model::random::no_request_to_a_damaged_image_panics_or_waits_forever`, the soak's `damage`) and the fuzz targets make
//! random combinations of faults.
//!
//! | an image that contains names of other files | |
//! |---|---|
//! | raw content that looks like a qcow2 header | `qcow2::hostile::guest_data_does_not_turn_a_raw_disk_into_another_format`, `nbd::serve::a_probed_raw_image_never_turns_into_another_format` |
//! | writing to a probed image | `qcow2::hostile::a_disk_that_was_probed_as_raw_refuses_to_become_another_format` |
//! | backing name `json:`, `nbd:`, `nfs:`, … | `qcow2::hostile::an_untrusted_image_does_not_choose_a_protocol_for_its_backing_file`, `tools::img_rebase::a_name_in_an_untrusted_image_does_not_choose_a_protocol` |
//! | data file name `json:`, `nbd:`; the name of a missing file, or of the image itself | `qcow2::data_file::the_name_of_a_data_file_is_always_a_path`, "data file that …" |
//! | `info` opens only the image | `qcow2::hostile::info_opens_nothing_but_the_image_unless_asked`, `tools::img_hostile::info_opens_nothing_but_the_image_itself` |
//! | a given format overrides probing, also in `convert` and `resize` | `tools::img_hostile::a_given_format_overrides_probing` |
//! | loops of backing files | `qcow2::hostile::a_loop_of_backing_files_ends_in_an_error` |
//! | temporary files have no name that another process could use | `oxblk-protocols: a_temporary_file_has_no_name` |
//!
//! | sizes | |
//! |---|---|
//! | 2^63, 2^64 - 1, 0 | "size 2^63", "size 2^64 - 1", "size 0" |
//! | 12,802 TiB | `qcow2::hostile::a_disk_of_12802_tib_is_inspected_in_bounded_memory_and_time` |
//! | tables larger than the file | "L1 of 32 MiB in a file of 600 KiB", "refcount table of 8 MiB in a file of 600 KiB" |
//! | compression bombs | "a bomb: one compressed stream for 8,192 clusters", "compressed data that claims more than it has" |
//! | `check`, `map`, `info`, `measure` in bounded memory and time | every case, by [`bounded`] |
//!
//! | qcow2 | |
//! |---|---|
//! | header length, extension length | "header of 71 bytes" … "extension length all set" |
//! | backing file offset and size | "backing name …" |
//! | refcount table, L1: unaligned, past the end, overlapping, overflowing, too large | "refcount table …", "L1 …" |
//! | snapshot table: offset, count | "more snapshots than allowed", "65,536 snapshots of nothing", "snapshot table …" |
//! | snapshot: extra data, name, L1 larger than the active one | "snapshot with …", "snapshot L1 …" |
//! | refcount order, cluster bits, encryption method | "refcounts of 128 bits", "clusters of …", "unknown encryption" |
//! | LUKS header: magic, names, key slots, key material, payload, iterations | `encryption::broken_luks_headers_are_refused_with_qemus_messages`, `encryption::no_luks_header_makes_a_tool_compute_for_hours_or_read_past_the_end` |
//! | the error contains the names of unknown incompatible bits; autoclear bits | "unknown incompatible bit 63", "unknown autoclear bit" |
//! | clusters beyond the refcount table | "L2 entry beyond all that the refcount table could count" |
//! | L2 entries: reserved bits, unaligned, on metadata, on themselves | "L2 entry …" |
//! | extended L2 entries: bitmaps that contradict themselves or the entry | the cases of [`qcow2_subclusters`] |
//! | compressed descriptors past the end | "compressed data past the end", "compressed descriptor all set" |
//! | bitmap directory: wrong sizes, duplicate names, in use | "bitmap …", "two bitmaps of one name", `img_bitmap::a_broken_bitmap_can_be_listed_removed_and_repaired_without_data_loss`, `img_bitmap::an_unreadable_bitmap_directory_does_not_prevent_a_repair` |
//! | dirty and corrupt bits | "dirty", "marked corrupt" |
//! | writes and discards without refcounts | "no refcount blocks", "all refcounts 0"; every case includes a write, a zero write, a discard, a resize and a repair |
//! | repair when the disk is full | `oxblk-formats: refcounts_are_rebuilt_inside_the_file_if_the_disk_is_full` |
//!
//! | vdi | |
//! |---|---|
//! | header: signature, version, sizes, offsets, identifiers | "signature", "version", "block size …", "sector size …", "… offset …", "parent" |
//! | number of blocks: too few for the disk size, too many | "fewer blocks than the disk needs", "more blocks than there may be" |
//! | block map larger than the file | "block map past the end of the file", `vdi::check::a_block_map_of_holes_is_checked_in_bounded_memory` |
//! | entries: shared, too large, past the end of the file | "two entries for one block", "an entry too large", … |
//!
//! | parallels | |
//! |---|---|
//! | tracks, entries, sectors: 0, too many, overflowing | "no tracks", "tracks …", "BAT of …", "… sectors" |
//! | BAT larger than the file; entries past the end | "BAT past the end", "an entry behind the end of the file" |
//! | offset of the data, format extension | "data offset …", "extension …" |
//!
//! | qed | |
//! |---|---|
//! | header: magic, cluster, table and header size, features, L1 offset, size | "magic", "cluster size …", "table size …", "header …", "unknown feature …", "L1 …", "size …" |
//! | backing name: length, place | "backing name …" |
//! | L1 and L2 entries: shared, unaligned, on the header, past the end | "L1 entry …", "L2 entry …", "two L2 entries for one cluster" |
//!
//! | vpc | |
//! |---|---|
//! | footers: damaged, cut off, different from each other, of another type | "both footers damaged", "no footer at the end", "type …", "a fixed and a dynamic footer" |
//! | header: cookie, offsets, block size, number of entries | "header …", "block size …", "… entries" |
//! | BAT larger than the file | "BAT past the end of the file", `vpc::check::a_bat_of_holes_is_checked_in_bounded_memory` |
//! | entries: shared, overlapping, on metadata, past the end of the file | "two entries for one block", "an entry inside another block", … |
//!
//! | clients of the NBD server (tests without a module are in `crates/exports/tests/nbd.rs`) | |
//! |---|---|
//! | export name of 3,000 bytes | `an_export_name_of_three_thousand_bytes_is_unknown` |
//! | option of 4 GiB | `an_option_of_four_gigabytes_ends_the_session`, `an_option_too_large_to_parse_is_answered_and_the_session_continues` |
//! | connect and disconnect immediately | `clients_that_disconnect_during_the_handshake_do_not_disturb_the_server`, `nbd::peers::a_port_scan_does_no_harm` |
//! | a stalled handshake; 10 s and more than 100 connections | `a_stalled_handshake_is_closed_in_time_and_others_are_served`, `a_handshake_may_take_ten_seconds_by_default`, `clients_with_more_than_a_hundred_connections_are_served_by_default` |
//! | request past the end, write to a read-only export | `requests_past_the_end_fail_with_the_errors_of_the_specification`, `a_read_only_export_refuses_every_write_and_still_reads` |
//! | a disconnect inside a write | `a_client_that_hangs_up_inside_a_write_leaves_the_disk_unchanged` |
//! | a client that reads no replies, memory use | `the_server_stops_receiving_from_a_client_that_receives_no_replies`, `serve::memory_stays_bounded_while_clients_send_reads_and_receive_no_replies` |
//! | the server stops while a client is connected | `stopping_completes_and_answers_requests_in_flight` |

pub mod image;
pub mod medium;
pub mod mutate;
pub mod parallels;
pub mod qcow2;
pub mod qcow2_extra;
pub mod qcow2_subclusters;
pub mod qcow2_tables;
pub mod qed;
pub mod vdi;
pub mod vpc;

use std::io::Read;
use std::path::Path;
use std::time::Duration;

use crate::formats;
use crate::program::{Program, Reply};
use image::Image;

/// The address space that a tool may use for a small image, in bytes. The address space includes thread stacks and allocator
/// arenas, so it is much larger than the memory that a tool uses.
const ADDRESS_SPACE: u64 = 3 << 30;

/// The time that a tool may take for a small image.
const TIME_LIMIT: Duration = Duration::from_secs(30);

/// The expected result for a corrupt image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    /// `check`, `info`, reads and writes fail. The errors contain this text.
    Refused(&'static str),
    /// `check` finds errors (exit code 2), and its output contains this text. Reads and writes may succeed or fail.
    Damaged(&'static str),
    /// `check` finds errors, as for [`Expect::Damaged`], and a write fails, so that it does not increase the damage.
    NotWritable(&'static str),
    /// Reads succeed, and `check` finds only leaks (exit code 3).
    Leaking,
    /// `info` and reads succeed, and `check` finds no fault.
    Harmless,
    /// The image opens and passes the check, but cannot be opened for writing. The error contains this text.
    ReadOnly(&'static str),
    /// Commands that only read the disk open the image without its snapshots, and print a warning. All other commands fail.
    /// The warning and the errors contain this text.
    WithoutSnapshots(&'static str),
    /// No tool crashes. Nothing else is expected.
    Survives,
}

/// One corrupt image.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// Describes the fault.
    pub name: &'static str,
    /// Corrupts a good image.
    pub spoil: fn(&mut Image),
    /// The expected result.
    pub expect: Expect,
}

/// Corrupt images that are made from one good image.
#[derive(Debug)]
pub struct Table {
    /// The kind of image within its format.
    pub name: &'static str,
    /// The good image.
    pub good: Image,
    /// The cases: ways to corrupt the good image.
    pub cases: Vec<Case>,
}

/// The replies of the tools for one image.
struct Verdict {
    info: Reply,
    check: Reply,
    read: Reply,
    write: Reply,
}

/// Runs oxblk in a directory with bounded time and memory. The program must end by itself.
///
/// # Panics
/// When oxblk is killed, panics, or fails without a message.
pub fn bounded(directory: &Path, args: &[&str]) -> Reply {
    let reply = Program::oxblk()
        .args(args)
        .directory(directory)
        .time_limit(TIME_LIMIT)
        .address_space(ADDRESS_SPACE)
        .run();
    let line = args.join(" ");
    let said = reply.err();
    assert!(reply.status.code().is_some(), "oxblk {line} was killed ({}): {said}", reply.code());
    assert!(!said.contains("panicked"), "oxblk {line} panicked: {said}");
    assert!(
        reply.code() == 0 || !reply.stdout.is_empty() || !said.is_empty(),
        "oxblk {line} failed without a message"
    );
    reply
}

/// Runs the program on every case, each in a new directory, and reports all wrong results.
///
/// # Panics
/// When any case does not have its expected result.
pub fn through_the_program(format: &str, good: &Image, cases: &[Case]) {
    let mut wrong = Vec::new();
    // An image without a header begins with guest data. A write may change this data.
    let is_image = |known: &&dyn formats::TestFormat| known.is_image(good.bytes());
    let has_header = formats::FORMATS.iter().any(|known| known.name() == format && is_image(known));
    for case in cases {
        let mut image = good.clone();
        (case.spoil)(&mut image);
        let scratch = tempfile::tempdir().expect("a scratch directory");
        let outcome = std::panic::catch_unwind(|| {
            judge(format, scratch.path(), (&image, has_header), case.expect)
        });
        let message = match outcome {
            Ok(Ok(())) => continue,
            Ok(Err(message)) => message,
            Err(panic) => crate::panic_text(&*panic),
        };
        wrong.push(format!("{}: {message}", case.name));
    }
    assert!(wrong.is_empty(), "{} of {} cases:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
}

fn judge(
    format: &str,
    directory: &Path,
    (image, has_header): (&Image, bool),
    expect: Expect,
) -> Result<(), String> {
    const NAME: &str = "image";
    std::fs::write(directory.join(NAME), image.bytes()).expect("the image's file");
    let run = |args: &[&str]| bounded(directory, args);
    let info = run(&["img", "info", "-f", format, NAME]);
    let check = run(&["img", "check", "-f", format, NAME]);
    // These commands read all metadata. They may fail, but they must end.
    run(&["img", "map", "-f", format, NAME]);
    run(&["img", "measure", "-f", format, "-O", "qcow2", NAME]);
    let read = run(&["io", "-r", "-f", format, "-c", "read 0 320k", NAME]);
    let write = run(&["io", "-f", format, "-c", "write -P 9 0 64k", "-c", "write 1M 64k", NAME]);
    // These commands change metadata after the write.
    let change = ["-c", "discard 0 128k", "-c", "write -z 64k 64k", "-c", "write -c 192k 64k"];
    run(&[&["io", "-f", format], &change[..], &[NAME]].concat());
    run(&["img", "resize", "-q", "-f", format, NAME, "+1M"]);
    run(&["img", "compact", "-q", "-f", format, NAME]);
    run(&["img", "check", "-q", "-r", "all", "-f", format, NAME]);
    run(&["img", "compact", "-q", "-f", format, NAME]);
    verdict(&Verdict { info, check, read, write }, expect)?;
    let is_same = head(&directory.join(NAME)) == image.bytes().get(..8).unwrap_or(image.bytes());
    if has_header && !is_same {
        return Err("a write changed the header".to_owned());
    }
    Ok(())
}

/// Returns the first 8 bytes of a file, or all bytes of a shorter file. A write through a corrupt table may have made the file
/// too long to read completely.
fn head(path: &Path) -> Vec<u8> {
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).expect("the image's file");
    file.take(8).read_to_end(&mut bytes).expect("the image's file");
    bytes
}

fn verdict(tools: &Verdict, expect: Expect) -> Result<(), String> {
    let refused = |what: &str, reply: &Reply, text: &str| {
        if reply.code() == 1 && reply.err().contains(text) {
            return Ok(());
        }
        Err(format!("{what} should fail with {text:?}, got {}: {}", reply.code(), reply.err()))
    };
    let code = |what: &str, reply: &Reply, expected: i32| {
        if reply.code() == expected {
            return Ok(());
        }
        Err(format!(
            "{what} should end with {expected}, got {}: {}{}",
            reply.code(),
            reply.out(),
            reply.err()
        ))
    };
    let said = |reply: &Reply, text: &str| {
        let all = reply.out() + &reply.err();
        if all.contains(text) {
            Ok(())
        } else {
            Err(format!("a tool does not say {text:?}: {all}"))
        }
    };
    match expect {
        Expect::Refused(text) => {
            refused("check", &tools.check, text)?;
            refused("info", &tools.info, text)?;
            refused("read", &tools.read, text)?;
            refused("write", &tools.write, text)
        }
        Expect::Damaged(text) => {
            code("check", &tools.check, 2)?;
            said(&tools.check, text)
        }
        Expect::NotWritable(text) => {
            code("check", &tools.check, 2)?;
            said(&tools.check, text)?;
            code("write", &tools.write, 1)
        }
        Expect::Leaking => {
            code("check", &tools.check, 3)?;
            code("read", &tools.read, 0)
        }
        Expect::Harmless => {
            code("info", &tools.info, 0)?;
            code("check", &tools.check, 0)?;
            code("read", &tools.read, 0)
        }
        Expect::ReadOnly(text) => {
            code("check", &tools.check, 0)?;
            code("read", &tools.read, 0)?;
            refused("write", &tools.write, text)
        }
        Expect::WithoutSnapshots(text) => {
            refused("check", &tools.check, text)?;
            code("info", &tools.info, 0)?;
            said(&tools.info, text)?;
            code("read", &tools.read, 0)?;
            said(&tools.read, text)?;
            refused("write", &tools.write, text)
        }
        Expect::Survives => Ok(()),
    }
}
