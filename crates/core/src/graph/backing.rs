//! Determines the backing file of an image that is being opened: from the `backing` option, or from the reference in the image.

use std::sync::Arc;

use serde_json::Value;

use super::chain::{BACKING, Below};
use super::open::{PLAIN_AND_NESTED, Target, unsupported_option};
use super::{Graph, OpenContext, filename};
use crate::driver::DriverFactory;
use crate::gate::Purpose;
use crate::{Error, Options, Result};

impl Graph {
    /// Determines the backing file of an image. The `backing` option takes precedence over the reference in the image.
    pub(super) fn below(
        &self,
        driver: &'static dyn DriverFactory,
        context: &OpenContext,
        option: Option<Value>,
        depth: u32,
        nesting: u32,
    ) -> Result<Below> {
        let mut flags = context.flags.clone();
        flags.read_only = true;
        flags.auto_read_only = false;
        flags.probed = false;
        flags.unmap = false;
        flags.copy_on_read = false;
        let mut options = match option {
            Some(Value::Null) => return Ok(Below::Nothing),
            Some(Value::String(name)) if name.is_empty() => return Ok(Below::Nothing),
            // If backing files are not opened, the option is refused as unknown.
            Some(Value::Object(map)) if context.flags.no_backing => {
                let inner = Options::from_map(map)?.first_key().filter(|key| !key.is_empty());
                let key = inner.map_or("backing".to_owned(), |inner| format!("backing.{inner}"));
                return Err(unsupported_option(driver, &key));
            }
            Some(_) if context.flags.no_backing => {
                return Err(unsupported_option(driver, "backing"));
            }
            Some(Value::String(name)) => {
                let found = context.opening.node(self, &name);
                return found.map(Below::Node).map_err(|error| error.prefix(BACKING));
            }
            Some(Value::Object(mut map)) => {
                let plain = map.shift_remove("");
                let options = Options::from_map(map)?;
                if plain.is_some() && !options.is_empty() {
                    return Err(Error::invalid(PLAIN_AND_NESTED).prefix(BACKING));
                }
                options
            }
            None if context.flags.no_backing => return Ok(Below::Nothing),
            // A value of another type is ignored.
            Some(_) | None => Options::new(),
        };
        let mut filename = None;
        if !options.contains("file") && !options.contains("filename") {
            let Some(named) = &context.backing else {
                return Ok(if options.is_empty() {
                    Below::Nothing
                } else {
                    let depth = depth.saturating_add(1);
                    let opening = Arc::clone(&context.opening);
                    let rest = Target::default();
                    Below::Target(Target { options, flags, depth, nesting, opening, ..rest })
                });
            };
            let path = match context.image_filename() {
                Some(base) => filename::relative_to(&base, &named.filename),
                None => named.filename.clone(),
            };
            let failed = |error: Error| error.prefix(BACKING);
            let admitted = self.gate().admit(Purpose::Backing, &path).map_err(failed)?;
            flags.no_symlinks = admitted.no_symlinks;
            filename = Some(admitted.name);
            if let Some(format) = &named.format {
                options.insert_default("driver", format.clone());
            }
        }
        Ok(Below::Target(Target {
            filename,
            options,
            flags,
            protocol: false,
            named_above: true,
            depth: depth.saturating_add(1),
            nesting,
            opening: Arc::clone(&context.opening),
        }))
    }
}
