//! Creation and measurement of raw images. A new raw image is a file with the size of the disk, rounded up to whole
//! sectors.

use oxblk_core::create::{
    CreateOption, CreateRequest, CreateTarget, Measure, MeasureRequest, OptionType,
};
use oxblk_core::{Errno, Error, Options, Preallocation, Result, check_length};

use super::SECTOR;

/// The creation options of the format itself. Other options, like `preallocation`, belong to the protocol.
pub(super) const OPTIONS: &[CreateOption] = &[CreateOption {
    name: "size",
    kind: OptionType::Size,
    help: "Virtual disk size",
    default: None,
}];

fn take_size(options: &mut Options) -> Result<Option<u64>> {
    let Some(size) = options.take_size("size")? else { return Ok(None) };
    let rounded = size.checked_next_multiple_of(SECTOR);
    let rounded = rounded.filter(|size| i64::try_from(*size).is_ok());
    rounded.map(Some).ok_or_else(|| Error::from_errno(Errno::INVAL).prefix("Could not resize file"))
}

/// Reads the options: size and preallocation.
///
/// # Errors
/// Fails if a value is invalid.
pub(super) fn read(mut options: Options) -> Result<(u64, Preallocation)> {
    let size = take_size(&mut options)?.unwrap_or(0);
    check_length(size)?;
    let preallocation = match options.take_str("preallocation")? {
        None => Preallocation::Off,
        Some(name) => Preallocation::parse(&name)
            .ok_or_else(|| Error::invalid(format!("invalid parameter value: {name}")))?,
    };
    Ok((size, preallocation))
}

pub(super) async fn create(request: CreateRequest) -> Result<()> {
    let (size, preallocation) = read(request.options)?;
    let CreateTarget::File(file) = request.target else {
        return Err(Error::invalid("A raw image is created in a file"));
    };
    file.resize(size, preallocation).await
}

pub(super) fn measure(mut request: MeasureRequest<'_>) -> Result<Measure> {
    let size = match request.source {
        Some(source) => source.size(),
        None => request.options.take_size("size")?.unwrap_or(0),
    };
    let size = size.checked_next_multiple_of(SECTOR).unwrap_or(u64::MAX);
    Ok(Measure { required: size, fully_allocated: size, bitmaps: None })
}
