//! Jobs that are the only writer of an overlay: commit and rebase.

use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use futures_util::future::{Either, select};
use oxblk::commit::{self, Commit, CommitError};
use oxblk::copy::Observer;
use oxblk::core::snapshot::SnapshotInfo;
use oxblk::core::{Backend, ChildIdx, Error, Perm, Permissions, WriteFlags};
use oxblk::rebase::{self, Rebase, RebaseStage};
use oxblk::ring::{Config, IoBufMut, IoThread, yield_now};
use oxblk::{Create, Disk, ErrorKind, Format};
use oxblk_tests::scratch::in_memory;

const SIZE: u64 = 8 << 20;

struct Unheard;

impl Observer for Unheard {
    fn progress(&self, _done: u64, _total: u64) {}
}

/// An overlay whose first half has data, over a base that is full of data.
fn overlay(folder: &Path) -> PathBuf {
    let (base, top) = (folder.join("base.raw"), folder.join("top.qcow2"));
    std::fs::write(&base, vec![1; usize::try_from(SIZE).unwrap()]).unwrap();
    Create::overlay(&top, &base, Format::Raw).run().wait().unwrap();
    let disk = Disk::open(&top).wait().unwrap();
    disk.write(0, vec![2; usize::try_from(SIZE / 2).unwrap()]).wait().unwrap();
    disk.close().wait().unwrap();
    top
}

fn commit_of(top: &Backend) -> Commit {
    Commit {
        top: top.clone(),
        base: top.node().unwrap().child(ChildIdx::BACKING).unwrap(),
        empty: true,
        parallel: 2,
        rate: None,
        observer: Arc::new(Unheard),
        stop: Arc::new(AtomicBool::new(false)),
    }
}

/// A rebase to no backing file. The rebase writes the data of the old backing file to the overlay.
fn rebase_of(top: &Backend) -> Rebase {
    let old = top.node().unwrap().child(ChildIdx::BACKING).unwrap();
    let reader = Permissions::sharing_all(Perm::CONSISTENT_READ);
    Rebase {
        disk: top.clone(),
        old: Some(Backend::new(top.graph(), "", old, reader).unwrap()),
        new: None,
        common: None,
        compress: false,
        parallel: 2,
        observer: Arc::new(Unheard),
        stop: Arc::new(AtomicBool::new(false)),
    }
}

fn writer(of: &Backend) -> oxblk::core::Result<Backend> {
    let taken = Perm::CONSISTENT_READ | Perm::WRITE;
    Backend::new(of.graph(), "guest", of.node()?, Permissions::sharing_all(taken))
}

async fn write(to: &Backend, offset: u64, byte: u8) -> oxblk::core::Result<()> {
    to.write(offset, vec![byte; 512].into(), WriteFlags::empty()).await
}

async fn byte(of: &Backend, offset: u64) -> u8 {
    of.read(offset, IoBufMut::new(512)).await.unwrap()[0]
}

/// Runs the job `work` on the disk of `top`, and concurrently writes to `offsets` through `top`. Some of these writes must be
/// refused, because the job is the only writer. After the job, the disk must contain the data of the last writes that
/// succeeded, and new writes must succeed.
async fn write_during(top: &Backend, offsets: [u64; 2], work: impl Future<Output = ()>) {
    let mut work = pin!(work);
    let mut last = None;
    let mut refused: Option<Error> = None;
    for number in (10..99).cycle() {
        let write = async {
            for offset in offsets {
                match write(top, offset, number).await {
                    Ok(()) => last = Some(number),
                    Err(error) => {
                        let conflict = writer(top).unwrap_err();
                        assert_eq!(conflict.kind(), ErrorKind::Denied, "{conflict}");
                        assert!(conflict.to_string().contains("unshared by"), "{conflict}");
                        refused = Some(error);
                    }
                }
            }
        };
        match select(work, pin!(write)).await {
            Either::Left(((), unfinished)) => {
                unfinished.await;
                break;
            }
            Either::Right(((), job)) => work = job,
        }
        yield_now().await;
    }
    let refused = refused.expect("a write during the job is refused");
    assert_eq!(refused.kind(), ErrorKind::Denied, "{refused}");
    assert!(refused.to_string().contains("cannot write during the"), "{refused}");
    if let Some(last) = last {
        for offset in offsets {
            assert_eq!(byte(top, offset).await, last);
        }
    }
    for offset in offsets {
        write(top, offset, 99).await.unwrap();
        assert_eq!(byte(top, offset).await, 99);
    }
    writer(top).unwrap().close().await.unwrap();
}

#[test]
fn a_commit_loses_no_write_of_another_handle() {
    let folder = in_memory();
    let disk = Disk::open(overlay(folder.path())).wait().unwrap();
    let run = disk.run(|top| async move {
        write_during(&top, [0, SIZE - 4096], async {
            commit::run(commit_of(&top), &[]).await.unwrap();
        })
        .await;
        assert_eq!(byte(&top, SIZE / 2 - 512).await, 2);
        Ok::<_, Error>(())
    });
    run.wait().unwrap();
    disk.close().wait().unwrap();
}

#[test]
fn a_rebase_loses_no_write_of_another_handle() {
    let folder = in_memory();
    let disk = Disk::open(overlay(folder.path())).wait().unwrap();
    let run = disk.run(|top| async move {
        let job = rebase_of(&top);
        let old = job.old.clone().unwrap();
        write_during(&top, [0, SIZE - 4096], async {
            rebase::run(job, &[]).await.unwrap();
        })
        .await;
        assert_eq!(byte(&top, SIZE / 2).await, 1);
        old.close().await?;
        Ok::<_, Error>(())
    });
    run.wait().unwrap();
    disk.close().wait().unwrap();
}

#[test]
fn control_operations_of_other_handles_are_refused_during_a_job() {
    let folder = in_memory();
    let disk = Disk::open(overlay(folder.path())).wait().unwrap();
    let run = disk.run(|top| async move {
        let job = top.sole_writer("commit job").await?;
        let refused = [
            top.make_empty().await.unwrap_err(),
            top.create_snapshot(&SnapshotInfo::default()).await.unwrap_err(),
            top.change_backing_file(None, None).await.unwrap_err(),
        ];
        for error in refused {
            assert_eq!(error.kind(), ErrorKind::Denied, "{error}");
        }
        job.end().await?;
        assert_eq!(byte(&top, 0).await, 2);
        Ok::<_, Error>(())
    });
    run.wait().unwrap();
    disk.close().wait().unwrap();
}

#[test]
fn the_disk_can_be_written_after_the_thread_of_a_job_has_ended() {
    let folder = in_memory();
    let disk = Disk::open(overlay(folder.path())).wait().unwrap();
    let run = disk.run(|top| async move {
        let job = top.sole_writer("commit job").await?;
        assert!(write(&top, 0, 5).await.is_err());
        let thread = IoThread::start("job", Config::default())?;
        // The task of the job never ends. When the thread ends, it drops the task and with it the job.
        drop(thread.spawn(move || async move {
            let _job = job;
            std::future::pending::<()>().await;
        }));
        drop(thread);
        while write(&top, 0, 6).await.is_err() {
            yield_now().await;
        }
        let job = top.sole_writer("commit job").await?;
        // This is not an I/O thread, so the job's backend cannot be closed in the background. The drop itself must return
        // the permissions.
        std::thread::spawn(move || drop(job)).join().unwrap();
        write(&top, 0, 7).await?;
        let job = top.sole_writer("commit job").await?;
        job.backend().close().await?;
        job.end().await?;
        write(&top, 0, 8).await
    });
    run.wait().unwrap();
    disk.close().wait().unwrap();
}

#[test]
fn a_commit_and_a_rebase_refuse_an_overlay_with_another_writer() {
    let folder = in_memory();
    let disk = Disk::open(overlay(folder.path())).wait().unwrap();
    let run = disk.run(|top| async move {
        let guest = writer(&top)?;
        let node = top.node()?;
        let conflict = |job: &str| {
            let name = node.name();
            format!(
                "Permission conflict on node '{name}': permissions 'write' are both required by block device \
                 'guest' (uses node '{name}' as 'root' child) and unshared by {job} (uses node '{name}' as 'main \
                 node' child)."
            )
        };
        let Err(CommitError::Top(error)) = commit::run(commit_of(&top), &[]).await else {
            panic!("the commit is not refused");
        };
        assert_eq!(error.to_string(), conflict("commit job"));
        let job = rebase_of(&top);
        let old = job.old.clone().unwrap();
        let error = rebase::run(job, &[]).await.unwrap_err();
        assert_eq!(error.stage, RebaseStage::Attaching);
        assert_eq!(error.to_string(), conflict("rebase job"));
        old.close().await?;
        // Both users may still write.
        write(&top, 0, 5).await?;
        write(&guest, 512, 6).await?;
        guest.close().await?;
        commit::run(commit_of(&top), &[]).await.unwrap();
        assert_eq!((byte(&top, 0).await, byte(&top, 512).await), (5, 6));
        Ok::<_, Error>(())
    });
    run.wait().unwrap();
    disk.close().wait().unwrap();
}

#[test]
fn the_disk_can_be_written_after_a_cancelled_commit() {
    let folder = in_memory();
    let disk = Disk::open(overlay(folder.path())).wait().unwrap();
    let run = disk.run(|top| async move {
        let mut job = Box::pin(commit::run(commit_of(&top), &[]));
        while write(&top, 0, 7).await.is_ok() {
            assert!(futures_util::poll!(&mut job).is_pending());
            yield_now().await;
        }
        drop(job);
        while let Err(error) = write(&top, 0, 8).await {
            assert_eq!(error.kind(), ErrorKind::Denied, "{error}");
            yield_now().await;
        }
        assert_eq!(byte(&top, 0).await, 8);
        writer(&top)?.close().await?;
        Ok::<_, Error>(())
    });
    run.wait().unwrap();
    disk.close().wait().unwrap();
}

#[test]
fn a_reader_can_be_attached_to_an_overlay_during_a_commit() {
    let folder = in_memory();
    let disk = Disk::open(overlay(folder.path())).wait().unwrap();
    let run = disk.run(|top| async move {
        let mut job = Box::pin(commit::run(commit_of(&top), &[]));
        let base = top.node()?.child(ChildIdx::BACKING).unwrap();
        // The commit makes the base writable before it copies.
        while base.is_read_only() {
            assert!(futures_util::poll!(&mut job).is_pending());
            yield_now().await;
        }
        let reader = Permissions::sharing_all(Perm::CONSISTENT_READ);
        let reader = Backend::new(top.graph(), "", top.node()?, reader)?;
        assert_eq!(byte(&reader, 0).await, 2);
        reader.close().await?;
        job.await.unwrap();
        Ok::<_, Error>(())
    });
    run.wait().unwrap();
    disk.close().wait().unwrap();
}
