//! Carrying out a request: beginning it, counting it, and trying it again after an error that the device's policy holds.

use std::future::{Future, poll_fn};
use std::pin::pin;

use oxblk_ring::now;

use super::Backend;
use super::accounting::{IoType, Span};
use super::device::Failure;
use super::held::Turn;
use super::in_flight::Request;
use super::mode::Mode;
use crate::{IoOperation, Result, WriteFlags};

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
    /// Begins a request. Refuses it if it lies outside of the disk, or if the backend has no permission.
    async fn admit(&self, io: &Io) -> Result<Request<'_>> {
        let request = self.begin().await?.check(io.offset, io.len)?;
        if let Some(flags) = io.writes
            && let Err(error) = request.root.edge.may_write_with(flags)
        {
            request.done();
            return Err(error);
        }
        Ok(request)
    }

    /// Carries out a request. `attempt` makes an attempt of the request; its second argument is true if no other attempt can
    /// follow. `ignored` is the result of a request that has failed if the device ignores errors.
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
        if !mode.intersects(Mode::ACCOUNTED | Mode::DEVICE) {
            let request = self.admit(&io).await?;
            return attempt(request, true).await;
        }
        let is_last = !mode.contains(Mode::DEVICE);
        let mut turn = None;
        loop {
            let (round, started) = (self.0.held.round(), mode.contains(Mode::ACCOUNTED).then(now));
            let request = match self.admit(&io).await {
                Ok(request) => request,
                Err(error) => {
                    self.account_invalid(io.kind);
                    return Err(error);
                }
            };
            let error = match start_in_turn(attempt(request, is_last), turn.take()).await {
                Ok(value) => {
                    self.account_end(&io, Span::until_now(started), true);
                    return Ok(value);
                }
                Err(error) => error,
            };
            // Taken before the request is held: the time during which it is held is no latency.
            let span = Span::until_now(started);
            let failure = match is_last {
                true => None,
                false => self.handle_failure(io.operation(), &error, round),
            };
            match failure {
                Some(Failure::Ignore) => {
                    self.account_end(&io, span, true);
                    return Ok(ignored());
                }
                Some(Failure::Hold(held)) => turn = held.await,
                None | Some(Failure::Report) => {}
            }
            if turn.is_none() {
                self.account_end(&io, span, false);
                return Err(error);
            }
        }
    }
}

/// Awaits `attempt`. Passes `turn` on when the attempt has been started.
async fn start_in_turn<F: Future>(attempt: F, mut turn: Option<Turn<'_>>) -> F::Output {
    let mut attempt = pin!(attempt);
    poll_fn(|context| {
        let outcome = attempt.as_mut().poll(context);
        drop(turn.take());
        outcome
    })
    .await
}
