//! A daemon: a thread with a runtime of its own, which can be killed.
//!
//! The runtime makes progress only while its thread drives it. So to kill a daemon is to stop driving: from that instant
//! nothing of it moves, as when a process is killed. Then what it held open is closed, and what was on its threads for
//! blocking work is waited for: a write to a file that was under way is done or not done, as the kernel would have it,
//! before the next daemon looks.

use std::future::Future;
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
        let run = move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .max_blocking_threads(BLOCKING_THREADS_MAX)
                .thread_keep_alive(IDLE_THREADS_KEPT)
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
            runtime.shutdown_timeout(BLOCKING_WORK_TIMEOUT);
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
