//! Driving one task of an agent to its end.
//!
//! The task's id is chosen here and stays the same whatever happens: putting it again after a lost answer, after this
//! manager's death or after the agent's is the same as putting it once. So all there is to do about trouble on the
//! way is to ask again. An agent that does not know the task any more was restarted, and is given it anew.

use std::time::Duration;

use berth_api::ClientError;
use berth_api::agent::{
    PutTask, Task, TaskCancel, TaskOutput, TaskPath, TaskPut, TaskQuery, TaskShow, TaskSpec, TaskState,
};
use berth_api::endpoint::Nothing;
use berth_api::transport::BoxFuture;
use berth_model::host::Host;
use berth_model::name::Name;
use berth_model::operation::Progress;
use berth_model::vm::Vm;
use berth_model::{HostId, Problem, ProblemCode};
use tokio::time::Instant;

use crate::cluster::Cluster;
use crate::records::Row;

/// How long one question for news waits. Longer saves requests; shorter notices a dead connection earlier.
const NEWS_WAIT: Duration = Duration::from_secs(15);
/// First and longest pause before an agent that did not answer is asked again. Longer than the longest: a host that
/// is back is noticed late.
const PAUSES: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(3));

/// How long to go on with an agent that does not answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Patience {
    /// As long as it takes, cancelled or not: what became of the task must be known.
    Endless,
    /// So long without a word, or until cancelled.
    For(Duration),
}

/// Who wants to know how the task is getting on, and may stop it.
pub trait Listener: Send + Sync {
    /// The agent says how far it is.
    fn progress(&self, progress: Progress);
    /// This host does not answer.
    fn waiting_for(&self, host: &str);
    /// Done once the task is to be stopped.
    fn cancelled(&self) -> BoxFuture<'_, ()>;
}

/// Why there is no output.
#[derive(Debug)]
pub enum DriveError {
    /// The agent says that it failed, or won't do it; nothing of it is left there.
    Failed(Problem),
    /// The agent did not answer for too long, or until it was cancelled: what became of the task is not known.
    Unreachable(Problem),
}

impl DriveError {
    /// The problem, when the difference does not matter.
    pub fn into_problem(self) -> Problem {
        match self {
            Self::Failed(problem) | Self::Unreachable(problem) => problem,
        }
    }
}

/// One task and how it is to be driven.
pub struct Drive<'a> {
    /// The cluster.
    pub cluster: &'a Cluster,
    /// The host.
    pub host: &'a HostId,
    /// The task's id.
    pub task: String,
    /// What is to be done.
    pub put: PutTask,
    /// How long to go on without an answer.
    pub patience: Patience,
    /// Who listens.
    pub listener: &'a dyn Listener,
}

/// What is known of the task at the agent.
struct Course {
    /// The version that was seen last; none: it must be put.
    version: Option<u64>,
    cancel_sent: bool,
    cancelled: bool,
    silent_since: Option<Instant>,
    pause: Duration,
}

impl Drive<'_> {
    /// Puts the task and waits for its end.
    ///
    /// # Errors
    /// That it failed, or that the agent was not to be reached within its patience.
    pub async fn run(self) -> Result<TaskOutput, DriveError> {
        let mut course = Course {
            version: None,
            cancel_sent: false,
            cancelled: false,
            silent_since: None,
            pause: PAUSES.0,
        };
        loop {
            let host: std::sync::Arc<Row<Host>> =
                self.cluster.records.require(self.host.as_str()).map_err(DriveError::Failed)?;
            match self.ask(&host, &mut course).await {
                Ok(Some(task)) => {
                    course.silent_since = None;
                    course.pause = PAUSES.0;
                    course.version = Some(task.version);
                    match task.state {
                        TaskState::Running { progress } => self.listener.progress(progress),
                        TaskState::Succeeded { output } => return Ok(output),
                        TaskState::Failed { problem } => return Err(self.failed(problem, &host)),
                    }
                }
                // Cancelled while asking: the next question is the cancel.
                Ok(None) => {}
                Err(ClientError::Problem(problem)) => {
                    if course.version.is_none() && problem.code == ProblemCode::AlreadyExists {
                        // An earlier manager put it, with an earlier generation: it is the same task all the same.
                        course.version = Some(0);
                        continue;
                    }
                    if course.version.is_some() && problem.code == ProblemCode::NotFound {
                        // The agent was restarted: it is given the task anew, and must be told of the cancel again.
                        course.version = None;
                        course.cancel_sent = false;
                        continue;
                    }
                    return Err(self.failed(*problem, &host));
                }
                Err(error) => self.silence(&host, &mut course, error).await?,
            }
        }
    }

    fn failed(&self, problem: Problem, host: &Host) -> DriveError {
        let pool = match &self.put.spec {
            TaskSpec::FetchImage { pool, .. } | TaskSpec::DeleteImage { pool, .. } => Some(pool.clone()),
            TaskSpec::PrepareVm { definition } => Some(definition.spec.pool.clone()),
            _ => None,
        };
        let pool = pool.or_else(|| {
            let vm = self.put.vm.as_ref()?;
            Some(self.cluster.records.get::<Vm>(vm.as_str())?.spec.pool.clone())
        });
        DriveError::Failed(problem.of_host(host.name.as_str(), pool.as_ref().map(Name::as_str)))
    }

    /// One question, whichever is next; none when it was cancelled meanwhile.
    async fn ask(&self, host: &Host, course: &mut Course) -> Result<Option<Task>, ClientError> {
        let path = TaskPath { task: self.task.clone() };
        let agents = &self.cluster.agents;
        let Some(version) = course.version else {
            return agents
                .call::<TaskPut>(host, &path, &Nothing {}, &self.put, Duration::ZERO)
                .await
                .map(Some);
        };
        if course.cancelled && !course.cancel_sent {
            let task = agents.call::<TaskCancel>(host, &path, &Nothing {}, &(), Duration::ZERO).await?;
            course.cancel_sent = true;
            return Ok(Some(task));
        }
        let wait_ms = u64::try_from(NEWS_WAIT.as_millis()).unwrap_or(u64::MAX);
        let query = TaskQuery { after: Some(version), wait_ms: Some(wait_ms) };
        tokio::select! {
            answer = agents.call::<TaskShow>(host, &path, &query, &(), NEWS_WAIT) => answer.map(Some),
            () = self.listener.cancelled(), if !course.cancelled => {
                course.cancelled = true;
                Ok(None)
            }
        }
    }

    async fn silence(&self, host: &Host, course: &mut Course, error: ClientError) -> Result<(), DriveError> {
        let now = Instant::now();
        let since = *course.silent_since.get_or_insert(now);
        self.listener.waiting_for(host.name.as_str());
        let unreachable = |error: ClientError| {
            let cause = error.into_problem().message;
            DriveError::Unreachable(Problem::new(
                ProblemCode::Unreachable,
                format!("host {} can't be reached: {cause}", host.name),
            ))
        };
        let pause = course.pause;
        course.pause = (pause * 2).min(PAUSES.1);
        match self.patience {
            Patience::Endless => self.cluster.clock.sleep(pause).await,
            Patience::For(limit) if now.duration_since(since) >= limit => return Err(unreachable(error)),
            Patience::For(_) => {
                tokio::select! {
                    () = self.cluster.clock.sleep(pause) => {}
                    () = self.listener.cancelled() => return Err(unreachable(error)),
                }
            }
        }
        Ok(())
    }
}
