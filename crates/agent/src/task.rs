//! Tasks: what the manager asked for, by the ids that it chose.
//!
//! Putting a task that is known changes nothing and says how it stands, so a manager that does not know whether it was
//! heard asks again. The registry is memory only: after a restart a task is put again, and finds in what is on disk and
//! in the running QEMU how far it had come.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use berth_api::agent::{PutTask, Task, TaskOutput, TaskState};
use berth_model::operation::Progress;
use berth_model::{Problem, ProblemCode};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// How many finished tasks are remembered. Fewer: a manager that was away for long is told that a task is unknown and
/// puts it again, which costs a look at what is there. More: memory, under a kilobyte each.
const FINISHED_MAX: usize = 512;
/// Most tasks under way; more are refused, so that a manager gone mad can't eat the host's memory.
const RUNNING_MAX: usize = 4096;
/// Longest id, in bytes.
const ID_BYTES_MAX: usize = 128;
/// Longest wait that is granted. Longer ones would outlive what stands between the two.
pub const WAIT_MAX: Duration = Duration::from_secs(60);

/// What the work of a task is given: where to say how far it is, and whether it is still wanted.
#[derive(Debug, Clone)]
pub struct TaskContext {
    entry: Arc<Entry>,
}

#[derive(Debug)]
struct Entry {
    put: PutTask,
    state: Arc<watch::Sender<Task>>,
    cancel: CancellationToken,
}

/// What the registry keeps of a task: not what was asked for, which may be long, but only by what to know it again.
#[derive(Debug, Clone)]
struct Known {
    digest: blake3::Hash,
    state: Arc<watch::Sender<Task>>,
    cancel: CancellationToken,
}

impl TaskContext {
    /// A context that belongs to no registry: for work that nobody put, and for tests.
    pub fn detached(id: &str, put: PutTask) -> Self {
        Self { entry: Arc::new(Entry::new(id, put)) }
    }

    /// What was asked for.
    pub fn put(&self) -> &PutTask {
        &self.entry.put
    }

    /// The task's id.
    pub fn id(&self) -> String {
        self.entry.state.borrow().id.clone()
    }

    /// Says how far it is.
    pub fn progress(&self, progress: Progress) {
        self.entry.state.send_if_modified(|task| {
            let TaskState::Running { progress: old } = &mut task.state else { return false };
            let changed = *old != progress;
            *old = progress;
            task.version += u64::from(changed);
            changed
        });
    }

    /// Says which phase it is in, where there is nothing to count.
    pub fn phase(&self, phase: &str) {
        self.progress(Progress { phase: phase.to_owned(), ..Progress::default() });
    }

    /// Set when somebody asked for it to stop.
    pub fn cancel(&self) -> &CancellationToken {
        &self.entry.cancel
    }

    /// Stops here when somebody asked for it.
    ///
    /// # Errors
    /// [`ProblemCode::Cancelled`].
    pub fn check_cancelled(&self) -> Result<(), Problem> {
        if self.entry.cancel.is_cancelled() { Err(cancelled()) } else { Ok(()) }
    }

    /// Waits for `work`, unless somebody asks for it to stop first; the work is then dropped.
    ///
    /// # Errors
    /// [`ProblemCode::Cancelled`].
    pub async fn unless_cancelled<T>(&self, work: impl Future<Output = T>) -> Result<T, Problem> {
        tokio::select! {
            biased;
            () = self.entry.cancel.cancelled() => Err(cancelled()),
            result = work => Ok(result),
        }
    }

    fn finish(&self, result: Result<TaskOutput, Problem>) {
        self.entry.state.send_modify(|task| {
            task.version += 1;
            task.state = match result {
                Ok(output) => TaskState::Succeeded { output },
                Err(problem) => TaskState::Failed { problem },
            };
        });
    }

    pub(crate) fn task(&self) -> Task {
        self.entry.state.borrow().clone()
    }
}

/// What a cancelled task fails with.
pub fn cancelled() -> Problem {
    Problem::new(ProblemCode::Cancelled, "it was cancelled")
}

impl Entry {
    fn new(id: &str, put: PutTask) -> Self {
        let state =
            TaskState::Running { progress: Progress { phase: "waiting".to_owned(), ..Progress::default() } };
        let task = Task { id: id.to_owned(), version: 1, state };
        Self { put, state: Arc::new(watch::Sender::new(task)), cancel: CancellationToken::new() }
    }
}

fn digest(put: &PutTask) -> blake3::Hash {
    blake3::hash(&serde_json::to_vec(put).expect("bodies of the contract are plain data"))
}

/// All tasks that are known.
#[derive(Debug, Default)]
pub struct TaskRegistry {
    tasks: Mutex<Tasks>,
}

#[derive(Debug, Default)]
struct Tasks {
    known: BTreeMap<String, Known>,
    finished: VecDeque<String>,
}

/// What became of putting a task.
#[derive(Debug)]
pub enum Accepted {
    /// It is new: do it, and tell [`TaskRegistry::finish`].
    New(TaskContext),
    /// It was put before; this is how it stands.
    Known(Task),
}

impl TaskRegistry {
    /// Takes a task in.
    ///
    /// # Errors
    /// When the id is no id or stands for other work, or too much is under way.
    pub fn put(&self, id: &str, put: PutTask) -> Result<Accepted, Problem> {
        check_id(id)?;
        let mut tasks = self.lock();
        if let Some(known) = tasks.known.get(id) {
            if known.digest != digest(&put) {
                let message = format!("task '{id}' was put before with other content");
                return Err(Problem::new(ProblemCode::AlreadyExists, message));
            }
            return Ok(Accepted::Known(known.state.borrow().clone()));
        }
        if tasks.known.len() - tasks.finished.len() >= RUNNING_MAX {
            return Err(Problem::new(
                ProblemCode::Busy,
                format!("{RUNNING_MAX} tasks are under way already"),
            ));
        }
        let digest = digest(&put);
        let context = TaskContext::detached(id, put);
        let (state, cancel) = (Arc::clone(&context.entry.state), context.entry.cancel.clone());
        tasks.known.insert(id.to_owned(), Known { digest, state, cancel });
        Ok(Accepted::New(context))
    }

    /// Writes down how a task ended, and forgets the oldest of those that ended when there are too many.
    pub fn finish(&self, context: &TaskContext, result: Result<TaskOutput, Problem>) {
        let mut tasks = self.lock();
        tasks.finished.push_back(context.id());
        // While the registry is held: who sees the end of a task must not find it counted as running.
        context.finish(result);
        if tasks.finished.len() > FINISHED_MAX
            && let Some(oldest) = tasks.finished.pop_front()
        {
            tasks.known.remove(&oldest);
        }
    }

    /// How a task stands, once it is newer than `after` or `wait` has passed.
    ///
    /// # Errors
    /// When there is no such task.
    pub async fn show(&self, id: &str, after: Option<u64>, wait: Duration) -> Result<Task, Problem> {
        let mut state = self.find(id)?.state.subscribe();
        if let Some(after) = after {
            let newer = state.wait_for(|task| task.version > after);
            // That the time has passed is no fault: the present state is the answer.
            let _ = tokio::time::timeout(wait.min(WAIT_MAX), newer).await;
        }
        let task = state.borrow().clone();
        Ok(task)
    }

    /// Asks a task to stop.
    ///
    /// # Errors
    /// When there is no such task.
    pub fn cancel(&self, id: &str) -> Result<Task, Problem> {
        let known = self.find(id)?;
        known.cancel.cancel();
        let task = known.state.borrow().clone();
        Ok(task)
    }

    /// How many are under way.
    pub fn running(&self) -> usize {
        let tasks = self.lock();
        tasks.known.len() - tasks.finished.len()
    }

    fn find(&self, id: &str) -> Result<Known, Problem> {
        self.lock().known.get(id).cloned().ok_or_else(|| Problem::not_found("task", id))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Tasks> {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn check_id(id: &str) -> Result<(), Problem> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    if !id.is_empty() && id.len() <= ID_BYTES_MAX && id.bytes().all(plain) {
        return Ok(());
    }
    Err(Problem::field("task", id, format!("1 to {ID_BYTES_MAX} of A-Z, a-z, 0-9, '.', '_' and '-'")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use berth_api::agent::TaskSpec;

    fn put() -> PutTask {
        PutTask { vm: None, generation: 1, spec: TaskSpec::StopVm }
    }

    fn take(registry: &TaskRegistry, id: &str) -> TaskContext {
        match registry.put(id, put()).expect("put") {
            Accepted::New(context) => context,
            Accepted::Known(task) => panic!("known: {task:?}"),
        }
    }

    #[tokio::test]
    async fn a_task_that_is_put_twice_is_done_once() {
        let registry = TaskRegistry::default();
        let context = take(&registry, "op-1.stop.1");
        assert!(matches!(registry.put("op-1.stop.1", put()), Ok(Accepted::Known(_))));
        registry.finish(&context, Ok(TaskOutput::Done));
        let Ok(Accepted::Known(task)) = registry.put("op-1.stop.1", put()) else { panic!("forgotten") };
        assert_eq!(task.state, TaskState::Succeeded { output: TaskOutput::Done });
    }

    #[test]
    fn an_id_can_not_be_used_for_other_work() {
        let registry = TaskRegistry::default();
        take(&registry, "a");
        let other = PutTask { spec: TaskSpec::PauseVm, ..put() };
        assert_eq!(registry.put("a", other).expect_err("other").code, ProblemCode::AlreadyExists);
        for bad in ["", "a/b", "a b", &"x".repeat(129)] {
            assert_eq!(registry.put(bad, put()).expect_err(bad).code, ProblemCode::InvalidInput);
        }
    }

    #[tokio::test]
    async fn a_wait_ends_with_news_or_with_its_time() {
        let registry = Arc::new(TaskRegistry::default());
        let context = take(&registry, "a");
        let unchanged = registry.show("a", Some(1), Duration::from_millis(10)).await.expect("task");
        assert_eq!(unchanged.version, 1);
        let waiting = tokio::spawn({
            let registry = Arc::clone(&registry);
            async move { registry.show("a", Some(1), Duration::from_secs(30)).await }
        });
        context.phase("boot");
        context.phase("boot");
        assert_eq!(waiting.await.expect("join").expect("task").version, 2);
    }

    #[test]
    fn finished_tasks_are_forgotten_in_the_end_and_running_ones_never() {
        let registry = TaskRegistry::default();
        take(&registry, "running");
        for number in 0..FINISHED_MAX + 10 {
            let context = take(&registry, &format!("t{number}"));
            registry.finish(&context, Ok(TaskOutput::Done));
        }
        assert!(registry.find("t0").is_err() && registry.find("running").is_ok());
        assert_eq!(registry.lock().known.len(), FINISHED_MAX + 1);
        assert_eq!(registry.running(), 1);
    }
}
