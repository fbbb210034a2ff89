//! The table of all drivers. A new driver must be added to this table.

use oxblk_core::{DriverFactory, DriverTable, Error};
use oxblk_filters::{
    blkdebug, blklogwrites, blkverify, compress, copy_before_write, copy_on_read, preallocate,
    quorum, replication, snapshot_access, throttle,
};
use oxblk_formats::{absent, parallels, qcow2, qed, raw, vdi, vpc};
use oxblk_protocols::{file, null};

static DRIVERS: DriverTable = &[
    &file::FILE,
    &file::HOST_DEVICE,
    &null::NULL_CO,
    &null::NULL_AIO,
    qcow2::QCOW2,
    vdi::VDI,
    vpc::VPC,
    parallels::PARALLELS,
    qed::QED,
    &raw::RAW,
    &throttle::THROTTLE,
    &blkdebug::BLKDEBUG,
    &blklogwrites::BLKLOGWRITES,
    &blkverify::BLKVERIFY,
    &copy_before_write::COPY_BEFORE_WRITE,
    &copy_on_read::COPY_ON_READ,
    &compress::COMPRESS,
    &preallocate::PREALLOCATE,
    &quorum::QUORUM,
    &replication::REPLICATION,
    &snapshot_access::SNAPSHOT_ACCESS,
    &absent::VMDK,
    &absent::VHDX,
    &absent::QCOW,
    &absent::LUKS,
    &absent::BOCHS,
    &absent::CLOOP,
    &absent::DMG,
];

/// Whether a driver of the table can only recognise images of its format and cannot open them.
pub fn is_absent(name: &str) -> bool {
    absent::ALL.iter().any(|format| format.name() == name)
}

/// The error of an operation that needs the driver `name`, if [`is_absent`] is true for this driver; otherwise `None`.
pub fn absent_error(name: &str) -> Option<Error> {
    is_absent(name).then(|| absent::error(name))
}

/// All drivers.
pub fn drivers() -> DriverTable {
    DRIVERS
}
