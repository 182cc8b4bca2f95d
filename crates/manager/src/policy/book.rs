//! The book: all that decides who may do what, read from the records and made ready to be asked.
//!
//! It holds the teams, the segments, the grants (each as a Cedar policy of its own, named by the grant's id) and the
//! policies that somebody wrote. It is made anew when one of these has changed; what did not change is taken over. A
//! commit returns only when the copy of the records shows it, and the book is compared with the copy at each question,
//! so a grant that was taken away decides nothing any more.
//!
//! A user's *slice* is what can matter to that user: the policies that hold for everybody and the user's own grants. Of
//! these, a question about an action is asked only of those that are about that action, and the others' long lists of
//! actions are not looked through: a decision costs a fifth of what it would.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};

use berth_api::manager::{ExternalGroup, Grant, Policy as PolicyRecord, Role, Segment, Team, User};
use berth_model::access::{Action, built_in_role};
use berth_model::{GrantId, SegmentId, TeamId, Timestamp, UserId};
use berth_store::Revision;
use cedar_policy::{Policy, PolicySet, PrincipalConstraint};
use sha2::{Digest, Sha256};

use super::engine::{Engine, POLICIES, PolicyError, SCHEMA, actions_of, permits, renamed};
use crate::digest::hex;
use crate::records::{Records, Row};

/// Longest chain of teams or segments that are inside each other. Deeper, nobody sees through it any more.
pub const DEPTH_MAX: usize = 8;

/// Which state of the records a book was made of.
pub(super) type Stamp = [u64; 5];

/// How often each of the tables has changed that a book is made of.
pub(super) fn stamp(records: &Records) -> Stamp {
    [
        records.change_count::<Team>(),
        records.change_count::<Role>(),
        records.change_count::<Grant>(),
        records.change_count::<Segment>(),
        records.change_count::<PolicyRecord>(),
    ]
}

/// A grant, ready to be asked.
pub struct Held {
    /// The grant.
    pub grant: Arc<Row<Grant>>,
    /// What its role allows now.
    pub actions: Vec<Action>,
    text: String,
    /// Who and where, as they stand in a policy's head.
    who: String,
    place: String,
    /// As policies about one action each, made when they are first asked for.
    by_action: Mutex<HashMap<Action, Policy>>,
}

impl Held {
    /// The policy that this grant is, for one action that it has.
    fn policy(&self, action: Action) -> Result<Policy, PolicyError> {
        let mut known = self.by_action.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(policy) = known.get(&action) {
            return Ok(policy.clone());
        }
        let head = format!("action == Action::\"{}\"", action.as_str());
        let text = permit(&self.who, &head, &self.place, self.grant.until);
        let id = self.grant.value.id.as_str();
        let policy = Policy::parse(Some(cedar_policy::PolicyId::new(id)), &text)
            .map_err(|error| PolicyError { detail: format!("{id}: {error:?}") })?;
        known.insert(action, policy.clone());
        Ok(policy)
    }

    /// Whether it has not ended.
    pub fn is_live(&self, now: Timestamp) -> bool {
        self.grant.until.is_none_or(|until| now < until)
    }
}

/// A policy that somebody wrote, and that counts.
#[derive(Clone)]
pub struct Custom {
    /// Its record.
    pub record: Arc<Row<PolicyRecord>>,
    /// What it is made of, with the ids under which they decide.
    pub parts: Vec<Policy>,
}

impl Custom {
    /// Whether it was made of this very record.
    fn is(&self, record: &Row<PolicyRecord>) -> bool {
        self.record.id == record.id && self.record.revision == record.revision
    }
}

/// A written policy that forbids something and names somebody.
pub struct Guard {
    /// What it forbids.
    pub actions: BTreeSet<Action>,
    /// It is about those whom it names and nobody else, rather than naming them in a condition.
    pub is_against: bool,
}

/// What can matter to one user.
pub struct Slice {
    /// The teams that the user is in, directly or not.
    pub teams: Vec<TeamId>,
    /// The grants of the user and of these teams.
    pub grants: Vec<Arc<Held>>,
    /// Those and what holds for everybody, as Cedar has it. Users with the same grants share them.
    sets: Arc<Sets>,
}

/// Policies by the action that they are about, made when they are first asked for.
#[derive(Default)]
struct Sets(Mutex<HashMap<Action, Arc<PolicySet>>>);

impl Sets {
    fn get_or_make(
        &self,
        action: Action,
        make: impl FnOnce() -> Result<PolicySet, PolicyError>,
    ) -> Result<Arc<PolicySet>, PolicyError> {
        let mut sets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(set) = sets.get(&action) {
            return Ok(Arc::clone(set));
        }
        let set = Arc::new(make()?);
        sets.insert(action, Arc::clone(&set));
        Ok(set)
    }
}

/// See the module's head.
pub struct Book {
    pub(super) stamp: Stamp,
    /// SHA-256 over everything that decides, in hexadecimal.
    pub hash: String,
    fixed: Vec<Policy>,
    grants: BTreeMap<GrantId, Arc<Held>>,
    customs: Vec<Custom>,
    teams: HashMap<TeamId, Arc<Row<Team>>>,
    segments: HashMap<SegmentId, Arc<Row<Segment>>>,
    slices: Mutex<HashMap<UserId, (Revision, Arc<Slice>)>>,
    /// The sets of each combination of grants that somebody has; of none, those that hold for everybody.
    sets: Mutex<HashMap<Vec<GrantId>, Arc<Sets>>>,
    everybody: Sets,
}

impl Book {
    /// Reads the records; what `before` has and has not changed is taken over.
    ///
    /// # Errors
    /// That a policy does not fit: then nothing may be decided.
    pub(super) fn read(
        engine: &Engine,
        records: &Records,
        before: Option<&Self>,
    ) -> Result<Self, PolicyError> {
        // Counted before it is read: what changes in between is read once more, and never missed.
        let stamp = stamp(records);
        let fixed = match before {
            Some(book) => book.fixed.clone(),
            None => fixed(engine)?,
        };
        let roles: HashMap<String, Vec<Action>> = records
            .list::<Role>()
            .into_iter()
            .map(|row| (row.name.to_string(), row.actions.clone()))
            .collect();
        let mut grants = BTreeMap::new();
        for grant in records.list::<Grant>() {
            let old = before.and_then(|book| book.grants.get(&grant.value.id));
            let held = held(grant, &roles, old);
            grants.insert(held.grant.value.id.clone(), held);
        }
        let mut customs = Vec::new();
        for record in records.list::<PolicyRecord>().into_iter().filter(|row| row.active) {
            let known = before.and_then(|book| book.customs.iter().find(|old| old.is(&record)));
            customs.push(known.cloned().map_or_else(|| custom(engine, record), Ok)?);
        }
        let teams = records.list::<Team>().into_iter().map(|row| (row.value.id.clone(), row)).collect();
        let segments = records.list::<Segment>().into_iter().map(|row| (row.value.id.clone(), row)).collect();
        let hash = hash(&grants, &customs);
        let slices = Mutex::default();
        let (sets, everybody) = (Mutex::default(), Sets::default());
        Ok(Self { stamp, hash, fixed, grants, customs, teams, segments, slices, sets, everybody })
    }

    /// What can matter to this user.
    pub fn slice(&self, user: &Row<User>) -> Arc<Slice> {
        let mut slices = self.slices.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((revision, slice)) = slices.get(&user.value.id)
            && *revision == user.revision
        {
            return Arc::clone(slice);
        }
        let slice = Arc::new(self.make_slice(user));
        slices.insert(user.value.id.clone(), (user.revision, Arc::clone(&slice)));
        slice
    }

    fn make_slice(&self, user: &User) -> Slice {
        let mut teams: Vec<TeamId> = Vec::new();
        for team in self.teams.values().filter(|team| is_member(team, &user.id, &user.external_groups)) {
            teams.extend(self.team_chain(&team.value.id));
        }
        teams.sort_unstable();
        teams.dedup();
        let grants: Vec<Arc<Held>> = self
            .grants
            .values()
            .filter(|held| {
                held.grant.user.as_ref() == Some(&user.id)
                    || held.grant.team.as_ref().is_some_and(|team| teams.contains(team))
            })
            .cloned()
            .collect();
        let key = grants.iter().map(|held| held.grant.value.id.clone()).collect();
        let mut shared = self.sets.lock().unwrap_or_else(PoisonError::into_inner);
        let sets = Arc::clone(shared.entry(key).or_default());
        Slice { teams, grants, sets }
    }

    /// What a question about this action is asked of; no slice: by who is no user.
    ///
    /// # Errors
    /// When the set can't be made.
    pub fn set_for(&self, slice: Option<&Slice>, action: Action) -> Result<Arc<PolicySet>, PolicyError> {
        let policies = || self.fixed.iter().chain(self.customs.iter().flat_map(|custom| &custom.parts));
        let everybodys = || self.everybody.get_or_make(action, || set_about(action, None, policies()));
        match slice {
            Some(slice) => slice.sets.get_or_make(action, || {
                let mut set = PolicySet::clone(&*everybodys()?);
                add_grants(&mut set, action, slice)?;
                Ok(set)
            }),
            None => everybodys(),
        }
    }

    /// A team and those that it is a part of.
    pub fn team_chain(&self, team: &TeamId) -> Vec<TeamId> {
        chain(team, |id| self.teams.get(id).and_then(|row| row.parent.clone()))
    }

    /// A segment and those that it is inside of.
    pub fn segment_chain(&self, segment: &SegmentId) -> Vec<SegmentId> {
        chain(segment, |id| self.segments.get(id).and_then(|row| row.parent.clone()))
    }

    /// A segment and all inside it, however deep.
    pub fn segments_within(&self, segment: &SegmentId) -> HashSet<SegmentId> {
        let inside = self.segments.keys().filter(|id| self.segment_chain(id).contains(segment)).cloned();
        // Itself also when it is gone: what is left of it, as its operations, is still in it.
        inside.chain([segment.clone()]).collect()
    }

    /// The grants that a team has itself.
    pub fn grants_of_team<'a>(&'a self, team: &'a TeamId) -> impl Iterator<Item = &'a Arc<Held>> {
        self.grants.values().filter(move |held| held.grant.team.as_ref() == Some(team))
    }

    /// A grant by its id, as it stands in a verdict.
    pub fn grant(&self, id: &str) -> Option<&Arc<Held>> {
        self.grants.get(&id.parse::<GrantId>().ok()?)
    }

    /// The policies that somebody wrote, and that count.
    pub fn customs(&self) -> &[Custom] {
        &self.customs
    }

    /// What the policies that somebody wrote and that name one of these users or teams are about. Who is in a team or
    /// not matters to a policy only if it names the team: nothing that policies can read leads there otherwise.
    pub fn actions_hung_on(&self, ids: &[&str]) -> BTreeSet<Action> {
        let parts = self.customs.iter().flat_map(|custom| &custom.parts);
        parts.filter(|policy| names_one_of(policy, ids)).flat_map(actions_of).collect()
    }

    /// The written policies that name one of these users or teams and forbid something.
    pub fn guards_naming(&self, ids: &[&str]) -> Vec<Guard> {
        let parts = self.customs.iter().flat_map(|custom| &custom.parts);
        let naming = parts.filter(|policy| !permits(policy) && names_one_of(policy, ids));
        naming
            .map(|policy| Guard { actions: actions_of(policy), is_against: is_about_one_of(policy, ids) })
            .collect()
    }

    /// The policy that holds everywhere, of this id.
    pub fn fixed_policy(&self, id: &str) -> Option<&Policy> {
        self.fixed.iter().find(|policy| policy.id().to_string() == id)
    }

    /// Whether something other than grants gives or takes this action; then a list can't be cut by segments alone.
    pub fn is_touched(&self, action: Action) -> bool {
        let customs = self.customs.iter().flat_map(|custom| &custom.parts);
        let guards = self.fixed.iter().filter(|policy| !permits(policy));
        customs.chain(guards).any(|policy| actions_of(policy).contains(&action))
    }

    /// What a segment is called.
    pub fn segment_name(&self, id: &SegmentId) -> String {
        self.segments.get(id).map_or_else(|| id.to_string(), |row| row.name.to_string())
    }

    /// What a team is called.
    pub fn team_name(&self, id: &TeamId) -> String {
        self.teams.get(id).map_or_else(|| id.to_string(), |row| row.name.to_string())
    }

    /// The same without a record of somebody's policies, and with other policies: for a look at what they would change.
    ///
    /// # Errors
    /// When the set can't be made.
    pub(super) fn set_with(
        &self,
        slice: Option<&Slice>,
        action: Action,
        without: &str,
        also: &[Policy],
    ) -> Result<PolicySet, PolicyError> {
        let others = self.customs.iter().filter(|custom| custom.record.id != without);
        let parts = self.fixed.iter().chain(others.flat_map(|custom| &custom.parts)).chain(also);
        set_about(action, slice, parts)
    }
}

/// Those of the policies that are about an action, and the grants that have it.
fn set_about<'a>(
    action: Action,
    slice: Option<&Slice>,
    policies: impl Iterator<Item = &'a Policy>,
) -> Result<PolicySet, PolicyError> {
    let mut set = PolicySet::new();
    for policy in policies.filter(|policy| actions_of(policy).contains(&action)) {
        set.add(policy.clone()).map_err(PolicyError::new)?;
    }
    if let Some(slice) = slice {
        add_grants(&mut set, action, slice)?;
    }
    Ok(set)
}

fn add_grants(set: &mut PolicySet, action: Action, slice: &Slice) -> Result<(), PolicyError> {
    for held in slice.grants.iter().filter(|held| held.actions.contains(&action)) {
        set.add(held.policy(action)?).map_err(PolicyError::new)?;
    }
    Ok(())
}

fn is_member(team: &Team, user: &UserId, external: &[ExternalGroup]) -> bool {
    team.members.contains(user) || team.external_groups.iter().any(|group| external.contains(group))
}

/// A thing and those above it, nearest first. A ring, which can't be made through the API, ends the walk.
fn chain<T: Clone + PartialEq>(first: &T, above: impl Fn(&T) -> Option<T>) -> Vec<T> {
    let mut all = vec![first.clone()];
    while let Some(next) = all.last().and_then(&above) {
        if all.contains(&next) || all.len() > DEPTH_MAX {
            break;
        }
        all.push(next);
    }
    all
}

fn fixed(engine: &Engine) -> Result<Vec<Policy>, PolicyError> {
    let policies = engine.read(POLICIES)?;
    policies
        .iter()
        .map(|policy| match policy.annotation("id") {
            Some(id) => Ok(renamed(policy, id)),
            None => Err(PolicyError::new(format_args!("{} has no @id", policy.id()))),
        })
        .collect()
}

/// What a role allows: a built-in one, or one that somebody made; nothing if there is none of this name.
pub fn role_actions(roles: &HashMap<String, Vec<Action>>, name: &str) -> Vec<Action> {
    match built_in_role(name) {
        Some(role) => role.actions().collect(),
        None => roles.get(name).cloned().unwrap_or_default(),
    }
}

fn held(grant: Arc<Row<Grant>>, roles: &HashMap<String, Vec<Action>>, old: Option<&Arc<Held>>) -> Arc<Held> {
    let mut actions = role_actions(roles, grant.role.as_str());
    actions.retain(|action| action.is_grantable());
    let (who, place) = (who_of(&grant), place_of(&grant));
    let names: Vec<String> =
        actions.iter().map(|action| format!("Action::\"{}\"", action.as_str())).collect();
    let text = permit(&who, &format!("action in [{}]", names.join(", ")), &place, grant.until);
    match old {
        Some(old) if old.text == text && old.grant.revision == grant.revision => Arc::clone(old),
        _ => Arc::new(Held { grant, actions, text, who, place, by_action: Mutex::default() }),
    }
}

/// Ids are of a form that needs no escaping.
fn who_of(grant: &Grant) -> String {
    match (&grant.team, &grant.user) {
        (Some(team), _) => format!("principal in Team::\"{team}\""),
        (None, Some(user)) => format!("principal == User::\"{user}\""),
        // Granted to nobody: a record that no route makes.
        (None, None) => "principal == User::\"nobody\"".to_owned(),
    }
}

fn place_of(grant: &Grant) -> String {
    match &grant.segment {
        Some(segment) => format!("resource in Segment::\"{segment}\""),
        None => "resource in Cluster::\"cluster\"".to_owned(),
    }
}

fn permit(who: &str, action: &str, place: &str, until: Option<Timestamp>) -> String {
    let until = match until {
        Some(until) => format!(" when {{ context.now_ms < {} }}", until.as_millis()),
        None => String::new(),
    };
    format!("permit ({who}, {action}, {place}){until};")
}

/// In Cedar's own form of a policy, in which every id stands as it is. A policy that has no such form counts.
fn names_one_of(policy: &Policy, ids: &[&str]) -> bool {
    policy.to_json().map_or(true, |json| {
        let text = json.to_string();
        ids.iter().any(|id| text.contains(id))
    })
}

fn is_about_one_of(policy: &Policy, ids: &[&str]) -> bool {
    match policy.principal_constraint() {
        PrincipalConstraint::In(uid) | PrincipalConstraint::Eq(uid) | PrincipalConstraint::IsIn(_, uid) => {
            ids.contains(&uid.id().unescaped())
        }
        PrincipalConstraint::Any | PrincipalConstraint::Is(_) => false,
    }
}

fn custom(engine: &Engine, record: Arc<Row<PolicyRecord>>) -> Result<Custom, PolicyError> {
    let parts = custom_parts(engine, &record)?;
    Ok(Custom { record, parts })
}

/// The policies of one text, under the ids under which they decide.
pub(super) fn custom_parts(engine: &Engine, record: &PolicyRecord) -> Result<Vec<Policy>, PolicyError> {
    let policies = engine.read(&record.text)?;
    let named = policies.iter().enumerate();
    Ok(named.map(|(index, policy)| renamed(policy, &format!("{}/{}", record.id, index + 1))).collect())
}

fn hash(grants: &BTreeMap<GrantId, Arc<Held>>, customs: &[Custom]) -> String {
    let mut hasher = Sha256::new();
    let mut put = |text: &str| {
        hasher.update((text.len() as u64).to_be_bytes());
        hasher.update(text);
    };
    put(SCHEMA);
    put(POLICIES);
    for (id, held) in grants {
        put(id.as_str());
        put(&held.text);
    }
    for custom in customs {
        put(&custom.record.id);
        put(&custom.record.text);
    }
    hex(&hasher.finalize())
}
