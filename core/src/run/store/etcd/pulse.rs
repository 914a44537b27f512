//! Whether anything still comes by a connection. However many networks are watched by it, one of them asks, and all know.

use std::time::Duration;

use tokio::sync::{Mutex, watch};
use tokio::time::{Instant, sleep_until};

/// What is known of a connection's path to its server.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Path {
    /// Something came.
    Carries,
    /// What was asked was not answered.
    Silent,
    /// It could not be asked.
    Unclear,
}

/// When a connection last gave a sign, and which.
pub(super) struct Pulse {
    last: watch::Sender<(Instant, Path)>,
    /// Held by the one that asks, while the others wait for the same answer.
    asking: Mutex<()>,
}

impl Pulse {
    pub(super) fn new() -> Self {
        Self { last: watch::Sender::new((Instant::now(), Path::Carries)), asking: Mutex::new(()) }
    }

    /// Something came by the connection.
    pub(super) fn beat(&self) {
        self.note(Path::Carries);
    }

    fn note(&self, path: Path) {
        self.last.send_replace((Instant::now(), path));
    }

    /// After a time without any sign, what one of those who wait here finds out with its `ask`. Who comes later than a sign of
    /// another's is told that.
    pub(super) async fn after(&self, quiet: Duration, ask: impl Future<Output = Path>) -> Path {
        let (when, _) = *self.last.borrow();
        sleep_until(when + quiet).await;
        let _asking = self.asking.lock().await;
        let (when, path) = *self.last.borrow();
        if when.elapsed() < quiet {
            return path;
        }
        let path = ask.await;
        self.note(path);
        path
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::future::pending;

    use futures_util::future::join_all;
    use tokio::time::{sleep, timeout};

    use super::*;

    const QUIET: Duration = Duration::from_secs(30);
    const MOMENT: Duration = Duration::from_millis(100);

    /// Of a connection by which nothing has come for long.
    fn quiet() -> Pulse {
        let pulse = Pulse::new();
        pulse.last.send_replace((Instant::now() - 2 * QUIET, Path::Carries));
        pulse
    }

    #[tokio::test]
    async fn one_asks_for_all() {
        let (pulse, asked) = (quiet(), Cell::new(0));
        let ask = async || {
            asked.set(asked.get() + 1);
            tokio::task::yield_now().await;
            Path::Silent
        };
        // Who gives up asking leaves it to the next.
        assert!(timeout(MOMENT, pulse.after(QUIET, pending())).await.is_err());
        let told = join_all((0..10).map(|_| pulse.after(QUIET, ask()))).await;
        assert_eq!((told, asked.get()), (vec![Path::Silent; 10], 1));
    }

    #[tokio::test]
    async fn what_comes_meanwhile_is_an_answer() {
        let pulse = quiet();
        let asking = pulse.asking.lock().await;
        let asks = async {
            sleep(MOMENT).await;
            pulse.beat();
            drop(asking);
        };
        let waits = timeout(QUIET, pulse.after(QUIET, pending()));
        assert_eq!(tokio::join!(waits, asks).0, Ok(Path::Carries));
    }

    #[tokio::test]
    async fn nobody_is_asked_before_it_is_quiet() {
        let (pulse, start) = (Pulse::new(), Instant::now());
        assert_eq!(pulse.after(MOMENT, async { Path::Unclear }).await, Path::Unclear);
        assert!(start.elapsed() >= MOMENT);
    }
}
