//! Tests of attached devices: state, policies for errors, events, write-through mode.

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use oxblk_core::{
    Backend, BlockEvent, DeviceOptions, Errno, ErrorKind, Graph, IoErrorAction, IoOperation,
    IoStatus, Limits, Notice, OnError, Perm, Permissions, Subscription, WriteFlags,
};
use oxblk_ring::{IoBuf, IoBufMut, block_on};

use super::all;
use crate::memory::{Memory, graph, node};

pub(super) fn policies(on_read_error: OnError, on_write_error: OnError) -> DeviceOptions {
    DeviceOptions {
        id: "disk0".to_owned(),
        on_read_error,
        on_write_error,
        ..DeviceOptions::default()
    }
}

pub(super) fn backend(memory: &Arc<Memory>) -> (Graph, Backend, Subscription) {
    let graph = graph();
    let backend = Backend::new(&graph, "b", node(&graph, "m", memory), all()).unwrap();
    let events = graph.events().subscribe(100, |_| true);
    (graph, backend, events)
}

/// The next event, without waiting: operation, action, errno, `nospace`.
fn next_error(events: &Subscription) -> Option<(IoOperation, IoErrorAction, i32, Option<bool>)> {
    match events.try_next()? {
        Notice::Event(BlockEvent::IoError {
            source,
            node_name,
            operation,
            action,
            nospace,
            errno,
            reason,
        }) => {
            assert_eq!((source.device.as_str(), source.id.as_deref()), ("b", Some("disk0")));
            assert_eq!(node_name, "m");
            assert_eq!(reason, oxblk_core::strerror(errno));
            Some((operation, action, errno, nospace))
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn only_one_device_can_be_attached() {
    block_on(async {
        let (_, backend, _) = backend(&Memory::new(4096, Limits::default()));
        let device = backend.attach_device(DeviceOptions::default()).unwrap();
        let error = backend.attach_device(DeviceOptions::default()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy);
        assert_eq!(error.to_string(), "Drive 'b' is already in use by another block device");
        drop(device);
        drop(backend.attach_device(DeviceOptions::default()).unwrap());
        assert_eq!(backend.device(), None);
        backend.close().await.unwrap();
        let error = backend.attach_device(DeviceOptions::default()).unwrap_err();
        assert_eq!(error.raw_errno(), Errno::NOMEDIUM);
    });
}

#[test]
fn the_default_policies_report_read_errors_and_hold_writes_without_space() {
    block_on(async {
        let memory = Memory::new(4096, Limits::default());
        let (_, backend, events) = backend(&memory);
        let _device = backend.attach_device(policies(OnError::Auto, OnError::Auto)).unwrap();
        let state = backend.device().unwrap();
        let policies = (state.options.on_read_error, state.options.on_write_error);
        assert_eq!(policies, (OnError::Report, OnError::Enospc));
        assert_eq!(state.io_status, Some(IoStatus::Ok));
        memory.errno.store(Errno::IO, SeqCst);
        let error = backend.write(0, IoBuf::zeroes(512), WriteFlags::empty()).await.unwrap_err();
        assert_eq!(error.raw_errno(), Errno::IO);
        let report = IoErrorAction::Report;
        assert_eq!(next_error(&events), Some((IoOperation::Write, report, Errno::IO, Some(false))));
        memory.errno.store(Errno::NOSPC, SeqCst);
        backend.read(0, IoBufMut::new(512)).await.unwrap_err();
        assert_eq!(
            next_error(&events),
            Some((IoOperation::Read, report, Errno::NOSPC, Some(true)))
        );
        assert_eq!(backend.io_status(), Some(IoStatus::Ok));
    });
}

#[test]
fn an_ignored_error_is_a_success_and_an_event() {
    block_on(async {
        let memory = Memory::new(4096, Limits::default());
        let (_, backend, events) = backend(&memory);
        backend.set_accounting(Default::default()).unwrap();
        let device = backend.attach_device(policies(OnError::Ignore, OnError::Ignore)).unwrap();
        assert_eq!(backend.io_status(), None);
        memory.errno.store(Errno::IO, SeqCst);
        let read = backend.read(0, vec_buf(&[7; 512])).await.unwrap();
        assert!(read.iter().all(|byte| *byte == 0));
        backend.write(0, vec![1; 512].into(), WriteFlags::empty()).await.unwrap();
        let ignore = IoErrorAction::Ignore;
        assert_eq!(next_error(&events), Some((IoOperation::Read, ignore, Errno::IO, None)));
        assert_eq!(next_error(&events), Some((IoOperation::Write, ignore, Errno::IO, None)));
        let counts = backend.statistics().unwrap().counts;
        assert_eq!((counts.read.operations, counts.read.failed), (1, 0));
        // Without a device, there is no policy and no event.
        drop(device);
        backend.read(0, IoBufMut::new(512)).await.unwrap_err();
        assert_eq!(events.try_next(), None);
    });
}

fn vec_buf(data: &[u8]) -> IoBufMut {
    IoBufMut::copy_from(data)
}

#[test]
fn requests_that_the_backend_refuses_are_reported_by_every_policy() {
    block_on(async {
        let graph = graph();
        let node = node(&graph, "m", &Memory::new(4096, Limits::default()));
        let read = Permissions::sharing_all(Perm::CONSISTENT_READ);
        let backend = Backend::new(&graph, "b", node, read).unwrap();
        let events = graph.events().subscribe(9, |_| true);
        for policy in [OnError::Ignore, OnError::Stop] {
            let _device = backend.attach_device(policies(policy, policy)).unwrap();
            let error = backend.read(4096, IoBufMut::new(1)).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::OutOfRange);
            let write = backend.write(0, IoBuf::zeroes(1), WriteFlags::empty()).await;
            assert_eq!(write.unwrap_err().kind(), ErrorKind::Denied);
        }
        backend.remove().await.unwrap();
        assert!(matches!(events.try_next(), Some(Notice::Event(BlockEvent::MediumRemoved { .. }))));
        let _device = backend.attach_device(policies(OnError::Stop, OnError::Stop)).unwrap();
        let error = backend.read(0, IoBufMut::new(1)).await.unwrap_err();
        assert_eq!(error.raw_errno(), Errno::NOMEDIUM);
        assert_eq!(events.try_next(), None);
    });
}

#[test]
fn a_device_has_an_io_status_if_its_policies_stop_like_in_qemu() {
    let (_, backend, _) = block_on(async { backend(&Memory::new(4096, Limits::default())) });
    for (read, write, has_status) in [
        (OnError::Report, OnError::Report, false),
        (OnError::Enospc, OnError::Report, false),
        (OnError::Ignore, OnError::Ignore, false),
        (OnError::Stop, OnError::Report, true),
        (OnError::Report, OnError::Enospc, true),
        (OnError::Report, OnError::Stop, true),
        (OnError::Auto, OnError::Auto, true),
    ] {
        let _device = backend.attach_device(policies(read, write)).unwrap();
        assert_eq!(backend.io_status().is_some(), has_status, "{read:?} {write:?}");
    }
    block_on(backend.close()).unwrap();
}

#[test]
fn the_tray_and_the_lock_are_recorded_and_a_moved_tray_is_an_event() {
    let (_, backend, events) = block_on(async { backend(&Memory::new(4096, Limits::default())) });
    let options = DeviceOptions { removable: true, has_tray: true, ..DeviceOptions::default() };
    let device = backend.attach_device(DeviceOptions { id: "cd0".to_owned(), ..options }).unwrap();
    let state = || backend.device().unwrap();
    assert_eq!((state().tray_open, state().locked), (Some(false), false));
    device.set_locked(true);
    device.set_tray_open(false);
    assert_eq!(events.try_next(), None);
    for open in [true, false] {
        device.set_tray_open(open);
        assert_eq!((state().tray_open, state().locked), (Some(open), true));
        let Some(Notice::Event(BlockEvent::TrayMoved { source, tray_open })) = events.try_next()
        else {
            panic!("no event");
        };
        assert_eq!((source.id.as_deref(), tray_open), (Some("cd0"), open));
        assert_eq!(source.backend, backend.id());
    }
    drop(device);
    let device = backend.attach_device(policies(OnError::Auto, OnError::Auto)).unwrap();
    device.set_tray_open(true);
    assert_eq!((state().tray_open, events.try_next()), (None, None));
    drop(device);
    block_on(backend.close()).unwrap();
}
