//! Carrying out a request: beginning it, counting it, and trying it again after an error that the device's policy holds.

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::Arc;

use oxblk_ring::now;

use super::Backend;
use super::accounting::{IoType, Span};
use super::device::Failure;
use super::held::Turn;
use super::in_flight::Request;
use super::mode::Mode;
use crate::{Error, IoOperation, Result, WriteFlags};

/// What a request does.
#[derive(Debug, Clone, Copy)]
pub(super) struct Io {
    pub(super) kind: IoType,
    pub(super) offset: u64,
    pub(super) len: u64,
    /// The flags, if the request needs write permission.
    pub(super) writes: Option<WriteFlags>,
}

impl Io {
    fn operation(&self) -> IoOperation {
        if self.kind == IoType::Read { IoOperation::Read } else { IoOperation::Write }
    }
}

impl Backend {
    /// Begins an attempt of a request. Refuses it if it lies outside of the disk, or if the backend has no permission.
    pub(super) async fn admit(&self, io: &Io) -> Result<Request<'_>> {
        let request = self.begin().await?.check(io.offset, io.len)?;
        match io.writes {
            Some(flags) => request.check_write(flags),
            None => Ok(request),
        }
    }

    /// Whether requests are neither counted nor subject to the policies of a device.
    pub(super) fn is_plain(&self) -> bool {
        !self.0.mode.get().intersects(Mode::ACCOUNTED | Mode::DEVICE)
    }

    /// Carries out a request. Reads and writes of a plain backend make their only attempt themselves. `attempt` makes an
    /// attempt of the request; its second argument is true if no other attempt can follow. `ignored` is the result of a
    /// request that has failed if the device ignores errors.
    pub(super) async fn carry_out<'a, T, F>(
        &'a self,
        io: Io,
        ignored: impl FnOnce() -> T,
        mut attempt: impl FnMut(Request<'a>, bool) -> F,
    ) -> Result<T>
    where
        F: Future<Output = Result<T>>,
    {
        let mode = self.0.mode.get();
        let is_last = !mode.contains(Mode::DEVICE);
        let round = self.0.held.round();
        let mut resumed: Option<Resumed<'_>> = None;
        loop {
            let started = mode.contains(Mode::ACCOUNTED).then(now);
            let admitted = self.admit(&io).await;
            let turn = match resumed.take() {
                // The medium was removed, or the device detached, while the resumed request waited for its admission. While a
                // request is in flight, its medium stays.
                Some(Resumed { error, span, .. }) if self.0.held.round() != round => {
                    if let Ok(request) = admitted {
                        request.done();
                    }
                    self.account_end(&io, span, false);
                    return Err(error);
                }
                Some(Resumed { turn, .. }) => Some(turn),
                None => None,
            };
            let request = match admitted {
                Ok(request) => request,
                Err(error) => {
                    self.account_invalid(io.kind);
                    return Err(error);
                }
            };
            let root = (!is_last).then(|| Arc::clone(&request.root));
            let mut attempt = pin!(attempt(request, is_last));
            let outcome = match turn {
                None => attempt.await,
                Some(turn) => start_in_turn(attempt.as_mut(), turn).await,
            };
            let error = match outcome {
                Ok(value) => {
                    self.account_end(&io, Span::until_now(started), true);
                    return Ok(value);
                }
                Err(error) => error,
            };
            // Taken before the request is held: the time during which it is held is no latency.
            let span = Span::until_now(started);
            let failure = root.and_then(|root| {
                self.handle_failure(io.operation(), &error, root.edge.node(), round)
            });
            let turn = match failure {
                Some(Failure::Ignore) => {
                    self.account_end(&io, span, true);
                    return Ok(ignored());
                }
                Some(Failure::Hold(held)) => held.await,
                None | Some(Failure::Report) => None,
            };
            let Some(turn) = turn else {
                self.account_end(&io, span, false);
                return Err(error);
            };
            resumed = Some(Resumed { turn, error, span });
        }
    }
}

/// A request that was held and may begin again.
struct Resumed<'a> {
    turn: Turn<'a>,
    /// The error and the span of the attempt that has failed.
    error: Error,
    span: Option<Span>,
}

/// Awaits `attempt`. Passes `turn` on when the attempt has been started.
async fn start_in_turn<F: Future>(mut attempt: Pin<&mut F>, turn: Turn<'_>) -> F::Output {
    let mut turn = Some(turn);
    poll_fn(|context| {
        let outcome = attempt.as_mut().poll(context);
        drop(turn.take());
        outcome
    })
    .await
}
