//! `open` and `reopen`.

use oxblk_core::{Error, Options};

use super::{Call, done_if};
use crate::cache::CacheMode;
use crate::getopt::{Opt, short};
use crate::io::Outcome;
use crate::io::session::{Open, Opening, Session};
use crate::program::err;

const OPEN: &[Opt] = &[
    short('s', false),
    short('n', false),
    short('C', false),
    short('r', false),
    short('k', false),
    short('i', true),
    short('o', true),
    short('U', false),
    short('t', true),
    short('d', true),
];

const REOPEN: &[Opt] = &[short('c', true), short('o', true), short('r', false), short('w', false)];

/// `open`.
pub(in crate::io) async fn open(session: &Session, call: Call<'_>) -> Outcome {
    let mut opening = Opening::default();
    let operands = call.parse(OPEN, |found| match found.id {
        'o' => options(session, &mut opening.options, &found.value),
        id => opening.letter(id, &found.value).map_err(|text| session.program.error(text)).ok(),
    });
    match operands.as_deref() {
        Some([filename]) => done_if(session.open(Some(filename), &opening).await),
        Some([]) if !opening.options.is_empty() => done_if(session.open(None, &opening).await),
        Some(_) => call.misused(),
        None => Outcome::Failed,
    }
}

/// Reads `-o`, with a warning where a word stands alone.
fn options(session: &Session, options: &mut Options, text: &str) -> Option<()> {
    for (key, value) in oxblk_core::split_keyval(text) {
        let value = value.unwrap_or_else(|| {
            session.program.warn(format_args!("short-form boolean option '{key}' deprecated"));
            err(format_args!("Please use {key}=on instead\n"));
            "on".to_owned()
        });
        if let Err(error) = options.set(&key, value) {
            session.program.report(&error);
            return None;
        }
    }
    Some(())
}

/// `reopen`: the image is closed and opened again under the changed options; if that fails, it is
/// opened as it was.
pub(in crate::io) async fn reopen(session: &Session, call: Call<'_>) -> Outcome {
    let Some(open) = session.current() else { return Outcome::Failed };
    let mut changed = Options::new();
    let mut opening = open.opening.clone();
    let mut access = None;
    let operands = call.parse(REOPEN, |found| match found.id {
        'c' => match CacheMode::parse(&found.value) {
            Some(mode) => {
                opening.cache(mode);
                Some(())
            }
            None => {
                session.program.error(format_args!("Invalid cache option: {}", found.value));
                None
            }
        },
        'o' => options(session, &mut changed, &found.value),
        letter if access.is_none() => {
            access = Some(letter == 'r');
            Some(())
        }
        _ => {
            session.program.error("Only one -r/-w option may be given");
            None
        }
    });
    match operands {
        Some(operands) if operands.is_empty() => {}
        Some(_) => return call.misused(),
        None => return Outcome::Failed,
    }
    if let Some(read_only) = access {
        if changed.contains("read-only") {
            session.program.error("Cannot set both -r/-w and 'read-only'");
            return Outcome::Failed;
        }
        opening.flags.read_only = read_only;
    }
    for (key, value) in changed.iter() {
        opening.options.insert(key, value.clone());
    }
    again(session, open, opening, &changed).await
}

async fn again(session: &Session, open: Open, opening: Opening, changed: &Options) -> Outcome {
    if !session.close().await {
        return Outcome::Failed;
    }
    let filename = open.filename.as_deref();
    match session.try_open(filename, &opening).await {
        Ok(()) => Outcome::Done,
        Err(error) => {
            say(session, &error, changed);
            drop(session.try_open(filename, &open.opening).await);
            Outcome::Failed
        }
    }
}

/// An option that the driver does not know cannot be changed.
fn say(session: &Session, error: &Error, changed: &Options) {
    let text = error.to_string();
    match changed.keys().find(|key| text.ends_with(&format!("does not support the option '{key}'")))
    {
        Some(key) => session.program.error(format_args!("Cannot change the option '{key}'")),
        None => session.program.report(error),
    }
}
