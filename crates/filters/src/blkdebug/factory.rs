//! Opens blkdebug nodes.

use std::sync::Arc;

use oxblk_core::{
    BoxFuture, ChildIdx, ChildSpec, DebugEvent, Driver, DriverFactory, DriverKind, Error,
    OpenContext, Options, Result, Roles,
};

use super::Blkdebug;
use super::overrides::{KEYS, Overrides};
use super::rules::Rules;
use super::sections::{self, Kind, Section};

/// The driver `blkdebug`.
pub static BLKDEBUG: BlkdebugFactory = BlkdebugFactory;

/// Opens blkdebug nodes.
#[derive(Debug)]
pub struct BlkdebugFactory;

const IMAGE: ChildSpec = ChildSpec { child: ChildIdx::FILE, name: "image", roles: Roles::FILTER };

/// The option for the file name of the image, from the file name of the node.
const IMAGE_NAME: &str = "x-image";

impl DriverFactory for BlkdebugFactory {
    fn name(&self) -> &'static str {
        "blkdebug"
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Filter
    }

    fn is_protocol(&self) -> bool {
        true
    }

    fn children(&self) -> &'static [ChildSpec] {
        &[IMAGE]
    }

    fn schemes(&self) -> &'static [&'static str] {
        &["blkdebug"]
    }

    /// `blkdebug:CONFIG:IMAGE`. The name of the configuration file may be empty.
    fn parse_filename(&self, filename: &str) -> Result<Options> {
        let mut options = Options::new();
        let Some(rest) = filename.strip_prefix("blkdebug:") else {
            options.insert(IMAGE_NAME, filename);
            return Ok(options);
        };
        let Some((config, image)) = rest.split_once(':') else {
            return Err(Error::invalid("blkdebug requires both config file and image path"));
        };
        if !config.is_empty() {
            options.insert("config", config);
        }
        options.insert(IMAGE_NAME, image);
        Ok(options)
    }

    fn open<'a>(&'a self, context: &'a mut OpenContext) -> BoxFuture<'a, Result<Box<dyn Driver>>> {
        Box::pin(async move { Ok(Box::new(open(context).await?) as Box<dyn Driver>) })
    }
}

async fn open(context: &mut OpenContext) -> Result<Blkdebug> {
    let mut own = context.options.clone();
    own.take(IMAGE.name);
    let is_option = |key: &str| KEYS.contains(&key) || Kind::ALL.iter().any(|k| k.name() == key);
    let has_options = own.keys().any(is_option);
    let options = &mut context.options;
    let config = options.take_str("config")?;
    let sections = match &config {
        Some(config) => sections::of_file(config)?,
        None => Vec::new(),
    };
    let mut rules = Vec::new();
    let mut all = sections;
    for kind in Kind::ALL {
        all.extend(sections::of_options(kind, options)?);
    }
    for kind in Kind::ALL {
        for section in all.iter().filter(|section| section.kind() == kind) {
            rules.push(Section::rule(section)?);
        }
    }
    let takes = sections::permissions(options, "take-child-perms")?;
    let unshares = sections::permissions(options, "unshare-child-perms")?;
    let named = options.take_str(IMAGE_NAME)?;
    context.open_child(IMAGE, named, false).await?;
    let below = context.file()?.node().limits().request_alignment;
    let overrides = Overrides::take(&mut context.options, below)?;
    let driver = Blkdebug {
        children: Arc::clone(&context.children),
        rules: Rules::new(rules),
        overrides,
        takes,
        unshares,
        config: config.unwrap_or_default(),
        has_options,
        options: own,
    };
    driver.rules.apply_event(DebugEvent::None).await;
    Ok(driver)
}
