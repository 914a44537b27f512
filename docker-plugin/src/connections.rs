//! What a connection to the socket may cost: how many there are, how long a request may take to arrive.
//!
//! Engines keep connections open between calls, for as long as they like: a connection that is idle is never closed for
//! being so, because a call that is just being sent on it would be repeated by the engine *without its body*. Only where
//! there are too many does the one that has been idle longest make room. A connection on which a request has begun and was
//! not answered for [`REQUEST_MAX`] is cut.

use std::collections::BTreeMap;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use axum::serve::Listener;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::unix::SocketAddr;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Sleep, sleep, timeout};

/// Far more than engines open: two idle ones each, and one for every call under way.
const CONNECTIONS_MAX: usize = 512;

/// From a request's first byte to its answer. Calls take seconds at most.
const REQUEST_MAX: Duration = Duration::from_secs(30);

/// The socket, with a limit to the connections that are open at a time; others wait in its backlog.
pub(crate) struct Limited {
    listener: UnixListener,
    room: Arc<Semaphore>,
    open: Arc<Open>,
}

impl Limited {
    pub(crate) fn new(listener: UnixListener) -> Self {
        Self { listener, room: Arc::new(Semaphore::new(CONNECTIONS_MAX)), open: Arc::default() }
    }

    /// Room for one more; where there is none, every now and then a connection that has become idle is closed.
    async fn permit(&self) -> Option<OwnedSemaphorePermit> {
        /// Between two that are closed, should nobody leave by himself.
        const PATIENCE: Duration = Duration::from_millis(50);
        loop {
            if self.room.available_permits() == 0 {
                self.open.close_longest_idle();
            }
            let room = Arc::clone(&self.room).acquire_owned();
            if let Ok(permit) = timeout(PATIENCE, room).await {
                // An error would mean that the semaphore is closed, which nobody does.
                return permit.ok();
            }
        }
    }
}

impl Listener for Limited {
    type Io = Connection;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Connection, SocketAddr) {
        /// Until file descriptors are free again.
        const NAP: Duration = Duration::from_millis(200);
        loop {
            match self.listener.accept().await {
                Ok((stream, address)) => {
                    let permit = self.permit().await;
                    return (Connection::new(stream, permit, Arc::clone(&self.open)), address);
                }
                Err(error) => {
                    tracing::error!("no connection could be accepted: {error}");
                    tokio::time::sleep(NAP).await;
                }
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// The connections there are.
#[derive(Default)]
struct Open(Mutex<Idle>);

#[derive(Default)]
struct Idle {
    next: u64,
    /// The connections on which nothing is under way, by when they became so: counted, not timed.
    lines: BTreeMap<u64, Line>,
}

#[derive(Default)]
struct Line {
    unwanted: bool,
    reader: Option<Waker>,
}

impl Open {
    fn lock(&self) -> MutexGuard<'_, Idle> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A connection becomes idle; the answer names it.
    fn rests(&self) -> u64 {
        let mut idle = self.lock();
        idle.next += 1;
        let turn = idle.next;
        idle.lines.insert(turn, Line::default());
        turn
    }

    /// It is idle no longer, or gone.
    fn wakes(&self, turn: u64) {
        self.lock().lines.remove(&turn);
    }

    /// Whether it is to make room; if not now, `reader` is woken when it is.
    fn is_unwanted(&self, turn: u64, reader: &Waker) -> bool {
        let mut idle = self.lock();
        let Some(line) = idle.lines.get_mut(&turn) else { return false };
        line.reader = Some(reader.clone());
        line.unwanted
    }

    fn close_longest_idle(&self) {
        let mut idle = self.lock();
        let Some(line) = idle.lines.values_mut().find(|line| !line.unwanted) else { return };
        line.unwanted = true;
        if let Some(reader) = line.reader.take() {
            reader.wake();
        }
    }
}

/// One of them.
pub(crate) struct Connection {
    stream: UnixStream,
    open: Arc<Open>,
    state: State,
    _permit: Option<OwnedSemaphorePermit>,
}

enum State {
    /// Nothing is under way; its turn among those.
    Idle(u64),
    /// A request has begun; until when it must have been answered.
    Busy(Pin<Box<Sleep>>),
}

impl Connection {
    fn new(stream: UnixStream, permit: Option<OwnedSemaphorePermit>, open: Arc<Open>) -> Self {
        let state = State::Idle(open.rests());
        Self { stream, open, state, _permit: permit }
    }

    /// Something of a request was read.
    fn begins(&mut self) {
        if let State::Idle(turn) = self.state {
            self.open.wakes(turn);
            self.state = State::Busy(Box::pin(sleep(REQUEST_MAX)));
        }
    }

    /// Something of an answer was written.
    fn answers(&mut self) {
        if let State::Busy(_) = self.state {
            self.state = State::Idle(self.open.rests());
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if let State::Idle(turn) = self.state {
            self.open.wakes(turn);
        }
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = into.filled().len();
        match Pin::new(&mut self.stream).poll_read(context, into) {
            Poll::Ready(read) => {
                if into.filled().len() > before {
                    self.begins();
                }
                return Poll::Ready(read);
            }
            Poll::Pending => {}
        }
        let Self { open, state, .. } = &mut *self;
        match state {
            // The end of the stream, as if the other side had closed it.
            State::Idle(turn) if open.is_unwanted(*turn, context.waker()) => Poll::Ready(Ok(())),
            State::Idle(_) => Poll::Pending,
            State::Busy(until) => {
                ready!(until.as_mut().poll(context));
                tracing::warn!("a request was not complete {} s after it began: cut", REQUEST_MAX.as_secs());
                Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
            }
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        from: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.stream).poll_write(context, from));
        self.answers();
        Poll::Ready(written)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
