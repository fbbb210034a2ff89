//! The one list of drivers. A new driver is a line here.

use oxblk_core::DriverTable;
use oxblk_formats::{qcow2, raw};
use oxblk_protocols::{file, null};

static DRIVERS: DriverTable =
    &[&file::FILE, &file::HOST_DEVICE, &null::NULL_CO, &null::NULL_AIO, qcow2::QCOW2, &raw::RAW];

/// All drivers.
pub fn drivers() -> DriverTable {
    DRIVERS
}
