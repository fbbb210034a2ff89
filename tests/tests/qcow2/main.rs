//! Tests of qcow2 images: contents, changes, power cuts, and compatibility with the QEMU tools.

mod against_qemu;
mod bitmaps;
mod cache_clean;
mod changes;
mod changes_fail;
mod check;
mod commit;
mod compact;
mod compact_against_qemu;
mod compact_crash;
mod create;
mod data_file;
mod encryption;
mod fixed_size;
mod hostile;
mod hostile_work;
mod layout;
mod luks_keys;
mod matrix;
mod measure;
mod repair_header;
mod run_options;
mod snapshots;
mod subclusters;
mod vm_state;
mod zeroes;
