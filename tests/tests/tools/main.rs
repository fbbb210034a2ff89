//! `oxblk img` and `io`, compared with the QEMU tools.

mod convert_guest;
mod copy;
mod generated;
mod img_amend;
mod img_bitmap;
mod img_chains;
mod img_change;
mod img_commit;
mod img_convert;
mod img_convert_bytes;
mod img_convert_order;
mod img_create;
mod img_extremes;
mod img_foreign;
mod img_hostile;
mod img_inspect;
mod img_odd;
mod img_rebase;
mod img_snapshot;
mod io_commands;
mod json_names;
mod json_results;
mod limits;
mod misspelt;
mod names;
mod untrusted;
