//! Distributes operations to tasks on several threads. Operations in flight never conflict.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::ops::{Op, Shape};
use crate::random::Random;

/// The operations of a run. Clones are handles to the same pool.
#[derive(Clone)]
pub(crate) struct Pool(Arc<Mutex<State>>);

struct State {
    shape: Shape,
    random: Random,
    under_way: Vec<Op>,
    left: u64,
    failure: Option<String>,
}

/// The answer to a task that asks for work.
pub(crate) enum Next {
    /// Execute this operation.
    Do(Op),
    /// Ask again later: every operation that was tried conflicts with an operation in flight.
    Wait,
    /// No operations are left, or an operation has failed.
    End,
}

impl Pool {
    /// A pool of `operations` operations on a disk of this shape.
    pub(crate) fn new(shape: Shape, random: Random, operations: u64) -> Self {
        let left = operations;
        let state = State { shape, random, under_way: Vec::new(), left, failure: None };
        Self(Arc::new(Mutex::new(state)))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes an operation, which counts as in flight until [`Pool::done`].
    pub(crate) fn take(&self) -> Next {
        let mut state = self.lock();
        if state.left == 0 {
            return Next::End;
        }
        for _ in 0..8 {
            let State { shape, random, under_way, .. } = &mut *state;
            let op = shape.random_op(random);
            if under_way.iter().all(|other| *other != op && op.commutes_with(other)) {
                under_way.push(op.clone());
                state.left -= 1;
                return Next::Do(op);
            }
        }
        Next::Wait
    }

    /// Records that an operation is no longer in flight. A failure ends the work.
    pub(crate) fn done(&self, op: &Op, outcome: Result<(), String>) {
        let mut state = self.lock();
        state.under_way.retain(|other| other != op);
        if let Err(error) = outcome {
            state.failure.get_or_insert(error);
            state.left = 0;
        }
    }

    /// Returns the first failure, if there was one.
    pub(crate) fn outcome(&self) -> Result<(), String> {
        self.lock().failure.take().map_or(Ok(()), Err)
    }
}
