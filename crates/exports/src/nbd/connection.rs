//! The transmission phase of one connection.
//!
//! One task has three parts: one polls the requests in flight (the futures in the slots), one receives and starts
//! requests, and one sends replies (batches from the outbox). Whenever the task is woken, [`transmit`] polls the three
//! parts in this order. If replies that have been sent make room for a request that waits for the limits, [`transmit`]
//! polls the receiver and the sender again. So the parts can use `Cell`s for their common state, and do not need wakers
//! for each other.
//!
//! Limits: a request is outstanding from the moment when it is accepted until its reply has been sent. At most
//! [`MAX_OUTSTANDING`] requests are outstanding, with at most [`MAX_DATA`] bytes of data together. A request with more
//! data is accepted only when no other data is outstanding. The memory of requests is accounted in the connection's
//! [`Account`].

use super::MAX_REQUEST;
use super::account::Account;
use super::execute::{Accepted, Cost, Reply, execute, memory};
use super::input::Input;
use super::outbox::{Batch, Outbox};
use super::slots::{CAPACITY, Slots};
use oxblk_core::Backend;
use oxblk_nbd::wire::RequestHeader;
use oxblk_nbd::{Command, Limits, Malformed, RawRequest, Request, Session};
use oxblk_ring::Stream;
use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::io;
use std::pin::pin;
use std::rc::Rc;
use std::task::Poll;

/// Maximum number of outstanding requests of a connection.
const MAX_OUTSTANDING: usize = CAPACITY;
/// Maximum number of bytes of data of the outstanding requests of a connection, unless a single request has more data.
const MAX_DATA: usize = 16 << 20;

/// The reason why the transmission phase ended.
#[derive(Debug)]
pub(super) enum End {
    /// The client sent a disconnect request, or closed the connection between requests.
    Disconnected,
    /// The server is stopping.
    Stopped,
    /// The client made too little progress while it held memory and other connections waited for memory.
    Stalled,
    /// The client closed the connection inside a request.
    Cut,
    /// The client violated the protocol, so the start of the next request is unknown.
    Malformed(Malformed),
    /// The socket failed.
    Failed(io::Error),
}

/// The common state of the three parts.
struct Shared<'a, F> {
    account: &'a Rc<Account>,
    slots: RefCell<Slots<F>>,
    outbox: RefCell<Outbox>,
    /// Number of outstanding requests.
    outstanding: Cell<usize>,
    /// Bytes of data of the outstanding requests.
    data: Cell<usize>,
    /// Whether the last outstanding request is still being received.
    receiving: Cell<bool>,
    /// Bytes of data of a request that has been parsed, and is not accepted yet because of the limits.
    held_back: Cell<Option<usize>>,
}

impl<F: Future<Output = Reply>> Shared<'_, F> {
    fn has_room(&self, data: usize) -> bool {
        let used = self.data.get();
        self.outstanding.get() < MAX_OUTSTANDING && (used == 0 || used + data <= MAX_DATA)
    }

    /// Waits until the limits allow a request with `data` bytes, and then counts the request as outstanding. [`transmit`] polls
    /// this future again after replies have been sent, so no waker is needed.
    async fn accept(&self, data: usize) {
        poll_fn(|_| {
            let ready = self.has_room(data);
            self.held_back.set((!ready).then_some(data));
            if ready { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
        self.outstanding.set(self.outstanding.get() + 1);
        self.data.set(self.data.get() + data);
        self.receiving.set(true);
    }

    fn sent(&self, batch: &Batch) {
        self.outstanding.set(self.outstanding.get() - batch.replies);
        self.data.set(self.data.get() - batch.cost.data);
        self.account.release(batch.cost.held);
    }

    /// Polls the futures that were woken.
    fn run(&self) {
        let mut outbox = self.outbox.borrow_mut();
        self.slots.borrow_mut().poll_woken(|reply| outbox.push(reply));
    }

    fn start(&self, future: F) {
        self.receiving.set(false);
        let finished = self.slots.borrow_mut().start(future);
        if let Some(reply) = finished {
            self.outbox.borrow_mut().push(reply);
        }
    }

    /// Whether all completely received requests have been answered.
    fn is_answered(&self) -> bool {
        self.outstanding.get() == usize::from(self.receiving.get())
    }

    /// Whether a request waits for the limits, and the limits now allow the request.
    fn may_accept(&self) -> bool {
        self.held_back.get().is_some_and(|data| self.has_room(data))
    }
}

/// Serves requests until one of the reasons in [`End`] occurs. After that, requests in flight run to completion, and
/// their replies are sent if the socket still accepts data.
pub(super) async fn transmit(
    stream: &Stream,
    backend: Backend,
    session: Session,
    input: Input,
    account: &Rc<Account>,
    stop: impl Future<Output = ()>,
) -> End {
    let backend = Rc::new(backend);
    let shared = Shared {
        account,
        slots: RefCell::new(Slots::new()),
        outbox: RefCell::new(Outbox::new(session)),
        outstanding: Cell::new(0),
        data: Cell::new(0),
        receiving: Cell::new(false),
        held_back: Cell::new(None),
    };
    let begin = |accepted: Accepted| execute(Rc::clone(&backend), accepted);
    let mut receive = pin!(receive(stream, &shared, session, input, begin));
    let mut send = pin!(send(stream, &shared));
    let mut stop = pin!(stop);
    let mut end = None;
    let mut broken = false;
    poll_fn(|cx| {
        shared.slots.borrow().register(cx);
        shared.run();
        if end.is_none() && stop.as_mut().poll(cx).is_ready() {
            end = Some(End::Stopped);
        }
        if account.is_stalled() {
            end.get_or_insert(End::Stalled);
            broken = true;
            stream.shutdown();
        }
        loop {
            if end.is_none()
                && let Poll::Ready(ended) = receive.as_mut().poll(cx)
            {
                end = Some(ended);
            }
            if !broken && let Poll::Ready(error) = send.as_mut().poll(cx) {
                broken = true;
                end.get_or_insert(End::Failed(error));
            }
            if end.is_some() || !shared.may_accept() {
                break;
            }
        }
        let answered = broken || shared.is_answered();
        let running = shared.slots.borrow().len();
        account.watch(running, cx.waker());
        let idle = running == 0;
        if end.is_some() && idle && answered { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
    end.unwrap_or(End::Disconnected)
}

/// Sends the replies in the outbox, one batch after the other, until the socket fails.
async fn send<F: Future<Output = Reply>>(stream: &Stream, shared: &Shared<'_, F>) -> io::Error {
    loop {
        let mut batch = poll_fn(|_| match shared.outbox.borrow_mut().take() {
            Some(batch) => Poll::Ready(batch),
            None => Poll::Pending,
        })
        .await;
        while !batch.bufs.is_empty() {
            match stream.send(&mut batch.bufs).await {
                Ok(sent) => shared.account.progressed(sent),
                Err(error) => return error,
            }
        }
        shared.sent(&batch);
    }
}

/// Parses requests and starts them.
async fn receive<F: Future<Output = Reply>>(
    stream: &Stream,
    shared: &Shared<'_, F>,
    session: Session,
    input: Input,
    begin: impl Fn(Accepted) -> F,
) -> End {
    let limits = Limits {
        size: session.size,
        flags: session.flags,
        maximum: MAX_REQUEST,
        contexts: session.base_allocation.is_some(),
    };
    let mut receiver = Receiver { stream, input };
    loop {
        match receiver.next(shared, &limits).await {
            Ok(accepted) => shared.start(begin(accepted)),
            Err(end) => return end,
        }
    }
}

struct Receiver<'a> {
    stream: &'a Stream,
    input: Input,
}

impl Receiver<'_> {
    /// Returns the next request with its payload, or with an error if the request is invalid. Waits until the limits allow the
    /// request.
    async fn next<F: Future<Output = Reply>>(
        &mut self,
        shared: &Shared<'_, F>,
        limits: &Limits,
    ) -> Result<Accepted, End> {
        let raw = self.header().await?;
        let cookie = raw.cookie;
        let request = match raw.check(limits) {
            Ok(Request { command: Command::Disconnect, .. }) => return Err(End::Disconnected),
            Ok(request) => request,
            Err(error) => {
                shared.accept(0).await;
                if !self.input.skip(self.stream, bytes(raw.payload())).await.map_err(End::Failed)? {
                    return Err(End::Cut);
                }
                return Ok(Accepted {
                    cookie,
                    work: Err(error),
                    cost: Cost::default(),
                    block: None,
                });
            }
        };
        let data = match request.command {
            Command::Read { .. } | Command::Write { .. } => bytes(request.length),
            _ => 0,
        };
        shared.accept(data).await;
        let mut held = memory(&request);
        shared.account.hold(held).await;
        let (mut payload, mut block) = (None, None);
        if let Command::Write { .. } = request.command {
            let received = self.input.payload(self.stream, data).await.map_err(End::Failed)?;
            let received = received.ok_or(End::Cut)?;
            payload = Some(received.data.freeze());
            (held, block) = (held + received.held, received.block);
        }
        Ok(Accepted { cookie, work: Ok((request, payload)), cost: Cost { data, held }, block })
    }

    async fn header(&mut self) -> Result<RawRequest, End> {
        loop {
            if let Some(header) = self.input.bytes().first_chunk() {
                let raw = RawRequest::parse(header).map_err(End::Malformed)?;
                self.input.consume(RequestHeader::SIZE);
                return Ok(raw);
            }
            let between = self.input.bytes().is_empty();
            match self.input.fill(self.stream, RequestHeader::SIZE).await {
                Ok(true) => {}
                Ok(false) if between => return Err(End::Disconnected),
                Ok(false) => return Err(End::Cut),
                Err(error) => return Err(End::Failed(error)),
            }
        }
    }
}

fn bytes(length: u32) -> usize {
    usize::try_from(length).unwrap_or(usize::MAX)
}
