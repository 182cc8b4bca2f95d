//! A story that a seed tells: users do what users do, links are cut, daemons and machines die, and in the end everything
//! is healed, settles, and is looked at.
//!
//! What may happen is only limited by what a user can ask and what can break; refusals and failures on the way are fine.
//! What is not: a guest that runs twice or loses its past (the oracle sees it at once), and an end in which records,
//! agents, machines and files do not say the same, or a VM that can't be used any more.

use std::fmt::Write as _;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use berth_model::VmId;
use berth_model::vm::VmState;
use tokio::task::JoinSet;

use crate::chance::Chance;
use crate::cluster::act::Act;
use crate::cluster::{MANAGER, RequestError, USER, VmWish, done};
use crate::fault::{Fault, Moment};
use crate::network::Cut;
use crate::qemu::Pace;
use crate::{Plan, SimCluster, settled};

/// How many hosts a story has.
const HOSTS: usize = 3;
/// How many VMs it begins with.
const VMS: usize = 6;
/// How many things happen.
const HAPPENINGS: u64 = 60;
/// The longest time between two of them: short, against the time that a migration takes.
const PAUSE_MAX: Duration = Duration::from_millis(120);
/// Of twenty happenings, how many are cuts, deaths of daemons, and faults of machines: each story has one of these.
const WEATHERS: [[u64; 3]; 4] = [[2, 2, 2], [6, 1, 0], [1, 6, 0], [1, 1, 6]];
/// The longest pass over memory.
const PASS_MAX: Duration = Duration::from_millis(60);
/// How long something is gone at most.
const GONE_MAX: Duration = Duration::from_millis(1500);
/// How long everything may take to settle once it is healed. Operations wait for hosts that are gone with pauses of
/// seconds, and a host is believed to be gone for some.
const SETTLE: Duration = Duration::from_secs(90);
/// How long a story may take: it has some hundred waits of its own, each with an end.
const ALL_OF_IT: Duration = Duration::from_secs(300);
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// What became of a story.
#[derive(Debug, Clone, Default)]
pub struct Told {
    /// How many wishes came true.
    pub succeeded: usize,
    /// How many were refused, failed or cut off.
    pub failed: usize,
    /// How long it took to settle.
    pub settled_after: Duration,
}

/// Tells the story of a seed.
///
/// # Errors
/// What was wrong, with what happened before.
pub async fn tell(seed: u64) -> Result<Told, String> {
    let pace = Pace { pass: PASS_MAX, ..Pace::default() };
    let plan = Plan { shared_pool: seed.is_multiple_of(2), pace, ..Plan::new(HOSTS, seed) };
    let chance = Chance::new(seed);
    let story = Story {
        cluster: Arc::new(SimCluster::with(plan).await),
        weather: *chance.pick(&WEATHERS),
        chance,
        began: Instant::now(),
        happened: Mutex::default(),
    };
    // A wish is a request, and requests have no end of their own.
    let told = match tokio::time::timeout(ALL_OF_IT, story.run()).await {
        Ok(told) => told,
        Err(_) => Err("it does not come to an end".to_owned()),
    };
    let happened = story.happened();
    let verdict = story.cluster.world().oracle.verdict();
    // Wishes that were given up may still hold it for a moment; it goes with the last of them then.
    if let Some(cluster) = Arc::into_inner(story.cluster) {
        cluster.shut_down().await;
    }
    match (verdict, told) {
        (Ok(()), Ok(told)) => Ok(told),
        (Err(wrong), _) | (Ok(()), Err(wrong)) => {
            Err(format!("seed {seed}: {wrong}\nwhat happened:\n{happened}"))
        }
    }
}

struct Story {
    cluster: Arc<SimCluster>,
    chance: Chance,
    weather: [u64; 3],
    began: Instant,
    happened: Mutex<Vec<String>>,
}

impl Story {
    async fn run(&self) -> Result<Told, String> {
        let mut vms = self.cluster.create_vms(VMS).await;
        let (mut wishes, mut repairs) = (JoinSet::new(), JoinSet::new());
        let mut told = Told::default();
        for number in 0..HAPPENINGS {
            tokio::time::sleep(self.chance.up_to(PAUSE_MAX)).await;
            let [cuts, kills, breaks] = self.weather;
            match self.chance.below(20) {
                at if at < cuts => self.cut_something(&mut repairs),
                at if at < cuts + kills => self.kill_something(&mut repairs).await,
                at if at < cuts + kills + breaks => self.break_something(&vms),
                19 => self.wish_for_vm(number, &mut wishes),
                _ => self.wish(&vms, &mut wishes),
            }
            while let Some(Ok(wished)) = wishes.try_join_next() {
                vms.extend(self.came_true(wished, &mut told));
            }
        }
        while repairs.join_next().await.is_some() {}
        self.heal().await;
        while let Some(wished) = wishes.join_next().await {
            let wished = wished.map_err(|error| format!("a wish broke: {error}"))?;
            vms.extend(self.came_true(wished, &mut told));
        }
        let healed = Instant::now();
        settled::wait(&self.cluster, SETTLE).await?;
        told.settled_after = healed.elapsed();
        self.use_all().await?;
        Ok(told)
    }

    /// Writes down what became of a wish; gives the VM that it made.
    fn came_true(&self, wished: Wished, told: &mut Told) -> Option<VmId> {
        let mut happened = self.happened.lock().unwrap_or_else(PoisonError::into_inner);
        let at = self.began.elapsed().as_secs_f64();
        let line = &mut happened[wished.line];
        match wished.outcome {
            Ok(()) => {
                told.succeeded += 1;
                let _ = write!(line, ": done by {at:.3}");
            }
            Err(error) => {
                told.failed += 1;
                let _ = write!(line, ": not done by {at:.3}: {error}");
            }
        }
        wished.made
    }

    fn wish(&self, vms: &[VmId], wishes: &mut JoinSet<Wished>) {
        let vm = self.chance.pick(vms).clone();
        let which = usize::try_from(self.chance.below(8)).unwrap_or(0);
        let act = match self.chance.below(20) {
            0..5 => {
                Act::Migrate(self.chance.one_in(2).then(|| self.chance.pick(&self.cluster.hosts()).clone()))
            }
            7..9 => Act::Snapshot,
            9..12 => Act::Restore((which > 2).then_some(which)),
            12 => Act::DeleteSnapshot(which),
            13 => Act::Stop,
            14 => Act::Shutdown,
            15..17 => Act::Start,
            17 => self.chance.pick(&[Act::Pause, Act::Delete]).clone(),
            18 => Act::Resume,
            _ => Act::Restart,
        };
        let (cluster, log) = (Arc::clone(&self.cluster), self.note(&format!("{vm} {act:?}")));
        wishes.spawn(async move {
            let client = cluster.client();
            let outcome = match act.begin(&client, &vm).await {
                Ok(None) => Ok(()),
                Ok(begun) => done(&client, begun).await.map(drop),
                Err(error) => Err(error),
            };
            Wished { line: log, outcome, made: None }
        });
    }

    fn wish_for_vm(&self, number: u64, wishes: &mut JoinSet<Wished>) {
        let wish = VmWish { name: format!("later-{number}"), ..VmWish::default() };
        let (cluster, log) = (Arc::clone(&self.cluster), self.note(&format!("{} Create", wish.name)));
        wishes.spawn(async move {
            let made = cluster.create_vm(&wish).await;
            match made {
                Ok(vm) => Wished { line: log, outcome: Ok(()), made: Some(vm) },
                Err(error) => Wished { line: log, outcome: Err(error), made: None },
            }
        });
    }

    fn cut_something(&self, repairs: &mut JoinSet<()>) {
        let mut places = self.cluster.hosts();
        places.push(MANAGER.to_owned());
        let one = self.chance.pick(&places).clone();
        let other = self.chance.pick(&places).clone();
        let other = if one == other { USER.to_owned() } else { other };
        let how = if self.chance.one_in(2) { Cut::Hard } else { Cut::Silent };
        self.note(&format!("cut {one} - {other} ({how:?})"));
        self.cluster.network().cut(&one, &other, how);
        let (cluster, gone) = (Arc::clone(&self.cluster), self.chance.up_to(GONE_MAX));
        repairs.spawn(async move {
            tokio::time::sleep(gone).await;
            cluster.network().heal(&one, &other);
        });
    }

    async fn kill_something(&self, repairs: &mut JoinSet<()>) {
        let (cluster, gone) = (Arc::clone(&self.cluster), self.chance.up_to(GONE_MAX));
        if self.chance.one_in(3) {
            self.note("kill manager");
            self.cluster.kill_manager().await;
            repairs.spawn(async move {
                tokio::time::sleep(gone).await;
                cluster.start_manager().await;
            });
            return;
        }
        let number = usize::try_from(self.chance.below(HOSTS as u64)).unwrap_or(0);
        if self.chance.one_in(8) {
            self.note(&format!("power cut on host-{}", number + 1));
            self.cluster.cut_power(number).await;
        } else {
            self.note(&format!("kill agent of host-{}", number + 1));
            self.cluster.kill_agent(number).await;
        }
        repairs.spawn(async move {
            tokio::time::sleep(gone).await;
            cluster.start_agent(number).await;
        });
    }

    fn break_something(&self, vms: &[VmId]) {
        let vm = self.chance.pick(vms);
        let moment = Moment::nth_command(1 + self.chance.below(12));
        let fault = match self.chance.below(5) {
            0 => Fault::DieAtStart { words: "no such luck".to_owned() },
            1 => Fault::Hang(moment),
            2 => Fault::DieAt(moment),
            3 => Fault::DieAfter(moment),
            _ => Fault::Refuse { moment, words: "not now".to_owned() },
        };
        self.note(&format!("{vm} will meet {fault:?}"));
        self.cluster.world().faults.plan(vm, fault);
    }

    /// Everything that was broken is whole again.
    async fn heal(&self) {
        self.note("heal");
        self.cluster.world().faults.clear();
        // A machine that hangs is of no use to anybody. That its VM can be stopped is another test's to show.
        self.cluster.kill_hung();
        self.cluster.network().heal_all();
        self.cluster.start_manager().await;
        for number in 0..HOSTS {
            self.cluster.start_agent(number).await;
        }
    }

    /// Each VM can still be used, and deleted without a trace.
    async fn use_all(&self) -> Result<(), String> {
        let vms = self.cluster.vms().await.map_err(|error| error.to_string())?;
        for vm in &vms {
            let mut acts = match vm.status.state {
                VmState::Stopped => vec![Act::Start],
                VmState::Paused => vec![Act::Resume],
                _ => Vec::new(),
            };
            acts.extend([Act::Migrate(None), Act::Snapshot, Act::Stop, Act::Restore(Some(0)), Act::Delete]);
            for act in acts {
                self.must(&vm.id, act).await?;
            }
        }
        settled::wait(&self.cluster, SETTLE).await
    }

    async fn must(&self, vm: &VmId, act: Act) -> Result<(), String> {
        let client = self.cluster.client();
        let deadline = Instant::now() + SETTLE;
        let line = self.note(&format!("afterwards {vm} {act:?}"));
        loop {
            let outcome = match act.begin(&client, vm).await {
                Ok(begun) => done(&client, begun).await.map(drop),
                Err(error) => Err(error),
            };
            match outcome {
                Ok(()) => return Ok(()),
                // Berth takes baselines by itself, and may be at it.
                Err(RequestError::Refused(problem))
                    if problem.code == berth_model::ProblemCode::Busy && Instant::now() < deadline =>
                {
                    tokio::time::sleep(LOOK_EVERY).await;
                }
                Err(error) => {
                    let story = self.cluster.world().oracle.story(vm);
                    return Err(format!("afterwards {vm} can't {act:?} (line {line}): {error}\n{story}"));
                }
            }
        }
    }

    fn note(&self, what: &str) -> usize {
        tracing::info!("{what}");
        let mut happened = self.happened.lock().unwrap_or_else(PoisonError::into_inner);
        happened.push(format!("{:>7.3} {what}", self.began.elapsed().as_secs_f64()));
        happened.len() - 1
    }

    fn happened(&self) -> String {
        let happened = self.happened.lock().unwrap_or_else(PoisonError::into_inner);
        happened.iter().fold(String::new(), |mut text, line| {
            let _ = writeln!(text, "  {line}");
            text
        })
    }
}

struct Wished {
    line: usize,
    outcome: Result<(), RequestError>,
    made: Option<VmId>,
}
