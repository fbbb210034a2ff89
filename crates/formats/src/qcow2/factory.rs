//! Implements the trait [`DriverFactory`]: probing, opening, creating and measuring qcow2 images.

use oxblk_core::create::{CreateOption, CreateRequest, CreateTarget, Measure, MeasureRequest};
use oxblk_core::{
    BoxFuture, Driver, DriverFactory, DriverKind, Error, Graph, OpenContext, Options, Result,
};

use super::amend::AMEND_OPTIONS;
use super::create;
use super::create_options;
use super::layout::looks_like_qcow2;
use super::measure::measure;
use super::open::open;

struct Factory;

/// Refuses a backing file format for which there is no driver, and a wrong version.
fn check_backing_format(graph: &Graph, options: &Options) -> Result<()> {
    // A wrong version is reported before other wrong options, as in QEMU.
    create_options::version(options.get_str("compat"))?;
    match options.get_str("backing_fmt").filter(|name| graph.driver(name).is_err()) {
        Some(name) => Err(create_options::rejected("backing-fmt", name)),
        None => Ok(()),
    }
}

/// The qcow2 driver.
pub static QCOW2: &dyn DriverFactory = &Factory;

impl DriverFactory for Factory {
    fn name(&self) -> &'static str {
        "qcow2"
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Format
    }

    fn probe(&self, head: &[u8], _filename: Option<&str>) -> u32 {
        if looks_like_qcow2(head) { 100 } else { 0 }
    }

    fn supports_backing(&self) -> bool {
        true
    }

    fn open<'a>(&'a self, context: &'a mut OpenContext) -> BoxFuture<'a, Result<Box<dyn Driver>>> {
        Box::pin(async move {
            let image: Box<dyn Driver> = Box::new(open(context).await?);
            Ok(image)
        })
    }

    fn create_options(&self) -> &'static [CreateOption] {
        create::CREATE_OPTIONS
    }

    fn amend_options(&self) -> &'static [CreateOption] {
        AMEND_OPTIONS
    }

    fn check_create(&self, graph: &Graph, options: &Options) -> Result<()> {
        check_backing_format(graph, options)?;
        create::check(options.clone(), graph.secrets())
    }

    fn new_data_file<'a>(&self, options: &'a Options) -> Option<&'a str> {
        options.get_str("data_file")
    }

    fn create<'a>(
        &'a self,
        graph: &'a Graph,
        request: CreateRequest,
    ) -> Option<BoxFuture<'a, Result<()>>> {
        Some(Box::pin(async move {
            check_backing_format(graph, &request.options)?;
            match request.target {
                CreateTarget::File(_) if self.new_data_file(&request.options).is_some() => {
                    Err(Error::invalid("the creation of this image needs a data file"))
                }
                CreateTarget::File(file) => {
                    create::create(&file, None, request.options, graph.secrets()).await
                }
                CreateTarget::Files { file, data } => {
                    create::create(&file, Some(&data), request.options, graph.secrets()).await
                }
                CreateTarget::Filename(_) => Err(Error::invalid("qcow2 is created in a file")),
            }
        }))
    }

    fn measure<'a>(
        &'a self,
        request: MeasureRequest<'a>,
    ) -> Option<BoxFuture<'a, Result<Measure>>> {
        Some(Box::pin(measure(request)))
    }
}
