//! The commands `open` and `reopen`.

use oxblk::Cache;
use oxblk_core::{Backend, Error, Options, ReopenRequest};

use super::{Call, done_if};
use crate::flags::refusal::Refusal;
use crate::flags::spec::{Value, short};
use crate::flags::{Flag, Stored};
use crate::io::Outcome;
use crate::io::session::{Opening, Session};
use crate::program::out;
use crate::text::option_list::list;

/// The options of `open`.
pub(in crate::io) const OPEN: &[Flag<Opening>] = &[
    Flag::switch(short('s'), "write to a temporary overlay", |a| &mut a.temporary),
    Flag::switch_with(short('n'), "the same as -t none", Opening::set_direct),
    Flag::switch(short('C'), "store data that is read from a backing file in the image", |a| {
        &mut a.copy_on_read
    }),
    Flag::switch(short('r'), "open the image read-only", |a| &mut a.read_only),
    Flag::switch_with(short('k'), "the same as -i native", |a| a.set_aio("native")),
    Flag::value(short('i'), Value::AIO, "how the host executes requests", |a, name| {
        a.set_aio(&name)
    }),
    Flag::value(short('o'), Value::text("OPTIONS"), "driver options", |a, text| {
        if a.is_options {
            out(format_args!("--image-opts and 'open -o' are mutually exclusive\n"));
            return Err(Refusal::printed());
        }
        options(&mut a.options, &text)
    }),
    Flag::switch(short('U'), "allow other programs to write to the image", |a| &mut a.force_share),
    Flag::value(short('t'), Value::CACHE, "cache mode", |a, name| a.set_cache(&name)),
    Flag::value(short('d'), Value::DISCARD, "whether discards reach the host", |a, name| {
        a.set_discard(&name)
    }),
];

/// The options of `reopen`.
pub(in crate::io) const REOPEN: &[Flag<Changes>] = &[
    Flag::value(short('c'), Value::CACHE, "cache mode", |a, name| {
        let unknown = || Refusal::failed(format!("Invalid cache option: {name}"));
        a.cache = Some(Cache::parse(&name).ok_or_else(unknown)?);
        Ok(())
    }),
    Flag::value(short('o'), Value::text("OPTIONS"), "driver options", |a, text| {
        options(&mut a.options, &text)
    }),
    Flag::switch_with(short('r'), "make the image read-only", |a| a.set_read_only(true)),
    Flag::switch_with(short('w'), "make the image writable", |a| a.set_read_only(false)),
];

/// `open`.
pub(in crate::io) async fn open(session: &Session, call: Call<'_>) -> Outcome {
    let mut opening = Opening { is_options: session.image_options, ..Opening::default() };
    let operands = call.parse(session, OPEN, &mut opening);
    match operands.as_deref() {
        Some([filename]) => done_if(session.open(Some(filename), &opening).await),
        Some([]) => done_if(session.open(None, &opening).await),
        Some(_) => call.misused(),
        None => Outcome::Failed,
    }
}

/// Parses the value of `-o`, with a warning about each word without a value.
fn options(options: &mut Options, text: &str) -> Stored {
    for item in list(text, None) {
        match item.key.as_str() {
            "id" => return Err(Refusal::failed("Invalid parameter 'id'")),
            key => options.set(key, item.value).map_err(|error| Refusal::from(&error))?,
        }
    }
    Ok(())
}

/// The changes that `reopen` makes.
#[derive(Default)]
pub(in crate::io) struct Changes {
    options: Options,
    cache: Option<Cache>,
    read_only: Option<bool>,
}

impl Changes {
    fn set_read_only(&mut self, read_only: bool) -> Stored {
        match self.read_only.replace(read_only) {
            None => Ok(()),
            Some(_) => Err(Refusal::failed("Only one -r/-w option may be given")),
        }
    }
}

/// `reopen`: changes the options of the open image. If the reopen fails, the image keeps its old options.
pub(in crate::io) async fn reopen(session: &Session, call: Call<'_>) -> Outcome {
    let Some(open) = session.current() else { return Outcome::Failed };
    let mut changes = Changes::default();
    let operands = call.parse(session, REOPEN, &mut changes);
    match operands {
        Some(operands) if operands.is_empty() => {}
        Some(_) => return call.misused(),
        None => return Outcome::Failed,
    }
    // The requests in flight wait no longer for rate limits.
    if let Ok(node) = open.backend.node() {
        drop(open.backend.graph().drain(&node).await);
    }
    session.wait_for_requests().await;
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
        let given = options.get("cache").and_then(serde_json::Value::as_object);
        if given
            .is_some_and(|given| ["direct", "no-flush"].iter().any(|key| given.contains_key(*key)))
        {
            return Err(Error::invalid("Cannot set both -c and the cache options"));
        }
        options.set("cache.direct", mode.is_direct())?;
        options.set("cache.no-flush", mode.ignores_flushes())?;
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
        image.set_write_through(mode.is_write_through());
    }
    Ok(())
}
