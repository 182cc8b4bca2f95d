//! A daemon: a thread with a runtime of its own, which can be killed.
//!
//! The runtime makes progress only while its thread drives it. So to kill a daemon is to stop driving: from that instant
//! nothing of it moves, as when a process is killed. Then what it held open is closed, and what was on its threads for
//! blocking work is waited for: a write to a file that was under way is done or not done, as the kernel would have it,
//! before the next daemon looks.
//!
//! In this order: everything that waits is dropped first, since a thread may be waiting for it. The runtime's own
//! shutdown with a time-out does it the other way round, hence the count of threads.

use std::future::Future;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

/// As many as a real agent has.
const BLOCKING_THREADS_MAX: usize = 8;
/// A hundred daemons have better things to do than to keep idle threads.
const IDLE_THREADS_KEPT: Duration = Duration::from_millis(500);
/// How long blocking work may take to end when its daemon was killed. Longer means that it waits for somebody who can't
/// answer any more.
const BLOCKING_WORK_TIMEOUT: Duration = Duration::from_secs(20);

pub(super) struct Daemon {
    kill: CancellationToken,
    gone: oneshot::Receiver<()>,
}

impl Daemon {
    /// Starts a daemon and waits until it calls what its body is given: it is up then.
    ///
    /// # Panics
    /// When it ends before that.
    pub(super) async fn spawn<B, F>(name: &str, close: impl FnOnce() + Send + 'static, body: B) -> Self
    where
        B: FnOnce(Box<dyn FnOnce() + Send>) -> F + Send + 'static,
        F: Future<Output = ()>,
    {
        let kill = CancellationToken::new();
        let (is_up, up) = oneshot::channel();
        let (is_gone, gone) = oneshot::channel();
        let killed = kill.clone();
        let who = name.to_owned();
        let run = move || {
            let threads = Arc::new(Threads::default());
            let (starts, stops) = (Arc::clone(&threads), Arc::clone(&threads));
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .max_blocking_threads(BLOCKING_THREADS_MAX)
                .thread_keep_alive(IDLE_THREADS_KEPT)
                .on_thread_start(move || starts.change(1))
                .on_thread_stop(move || stops.change(-1))
                .build()
                .expect("a runtime");
            let ready = Box::new(move || {
                // Whoever started it may have given up.
                let _ = is_up.send(());
            });
            runtime.block_on(async {
                tokio::select! {
                    biased;
                    () = killed.cancelled() => {}
                    () = body(ready) => {}
                }
            });
            close();
            runtime.shutdown_background();
            if !threads.wait_for_none(BLOCKING_WORK_TIMEOUT) {
                tracing::error!("{who} is dead, and some of its blocking work goes on");
            }
            let _ = is_gone.send(());
        };
        std::thread::Builder::new().name(name.to_owned()).spawn(run).expect("a thread");
        up.await.unwrap_or_else(|_| panic!("{name} did not start"));
        Self { kill, gone }
    }

    /// Kills it, and waits until nothing of it is left.
    pub(super) async fn kill(self) {
        self.kill.cancel();
        // One that has panicked is gone too.
        let _ = self.gone.await;
    }
}

/// How many threads for blocking work there are.
#[derive(Debug, Default)]
struct Threads {
    count: Mutex<isize>,
    changed: Condvar,
}

impl Threads {
    fn change(&self, by: isize) {
        *self.count.lock().unwrap_or_else(PoisonError::into_inner) += by;
        self.changed.notify_all();
    }

    /// Waits until there are none. Whether that came about.
    fn wait_for_none(&self, timeout: Duration) -> bool {
        let count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.changed.wait_timeout_while(count, timeout, |count| *count > 0);
        let (count, _) = waited.unwrap_or_else(PoisonError::into_inner);
        *count == 0
    }
}
