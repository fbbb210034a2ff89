//! `open` and `reopen`.

use oxblk_core::{Backend, Error, Options, ReopenRequest};
use serde_json::Value;

use super::{Call, done_if};
use crate::cache::CacheMode;
use crate::getopt::{Opt, short};
use crate::io::Outcome;
use crate::io::session::{Opening, Session};
use crate::program::out;
use crate::text::option_list::list;

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
    let mut opening = Opening { is_options: session.image_options, ..Opening::default() };
    let operands = call.parse(OPEN, |found| match found.id {
        'o' if session.image_options => {
            out(format_args!("--image-opts and 'open -o' are mutually exclusive\n"));
            None
        }
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

/// Parses the value of `-o`, with a warning about each word without a value.
fn options(session: &Session, options: &mut Options, text: &str) -> Option<()> {
    for item in list(text, None) {
        let set = match item.key.as_str() {
            "id" => Err(Error::invalid("Invalid parameter 'id'")),
            key => options.set(key, item.value),
        };
        if let Err(error) = set {
            session.program.report(&error);
            return None;
        }
    }
    Some(())
}

/// The changes that `reopen` is to make.
#[derive(Default)]
struct Changes {
    options: Options,
    cache: Option<CacheMode>,
    read_only: Option<bool>,
}

/// `reopen`: changes the options of the open image. If that fails, the image keeps its old options.
pub(in crate::io) async fn reopen(session: &Session, call: Call<'_>) -> Outcome {
    let Some(open) = session.current() else { return Outcome::Failed };
    let mut changes = Changes::default();
    let operands = call.parse(REOPEN, |found| match found.id {
        'c' => {
            changes.cache = CacheMode::parse(&found.value);
            if changes.cache.is_none() {
                session.program.error(format_args!("Invalid cache option: {}", found.value));
            }
            changes.cache.map(drop)
        }
        'o' => options(session, &mut changes.options, &found.value),
        letter if changes.read_only.is_none() => {
            changes.read_only = Some(letter == 'r');
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
    session.settle().await;
    match apply(&open.backend, changes).await {
        Ok(()) => Outcome::Done,
        Err(error) => {
            session.program.report(&error);
            Outcome::Failed
        }
    }
}

async fn apply(image: &Backend, changes: Changes) -> Result<(), Error> {
    let Changes { mut options, cache, read_only } = changes;
    if read_only.is_some() && options.contains("read-only") {
        return Err(Error::invalid("Cannot set both -r/-w and 'read-only'"));
    }
    if let Some(mode) = cache {
        let given = options.get("cache").and_then(Value::as_object);
        if given
            .is_some_and(|given| ["direct", "no-flush"].iter().any(|key| given.contains_key(*key)))
        {
            return Err(Error::invalid("Cannot set both -c and the cache options"));
        }
        options.set("cache.direct", mode.direct)?;
        options.set("cache.no-flush", mode.no_flush)?;
    }
    match read_only {
        Some(read_only) => {
            options.insert("read-only", read_only);
            image.reopen(options).await?;
        }
        // The backend keeps its permissions, so the reopen fails if the new options do not allow them.
        None => {
            let request = ReopenRequest { node: image.node()?, options, keep: true };
            image.graph().reopen(vec![request]).await?;
        }
    }
    if let Some(mode) = cache {
        image.set_write_through(mode.write_through);
    }
    Ok(())
}
