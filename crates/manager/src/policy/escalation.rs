//! That nobody gives what it does not have.
//!
//! To make a grant, one must hold every action of its role in its segment oneself, for at least as long. The same
//! holds for whatever comes to the same: to let somebody into a team (which then has the team's grants), to put a team
//! into another, to add actions to a role that is granted somewhere, to make a token or set a password for somebody
//! (whose rights one could then use). What one holds is counted by grants alone: a right that comes from a written
//! policy can be used and not passed on. What is given counts such policies as well, if they name the user or the team; and what such
//! a policy keeps somebody from in person, it can't give either.

use berth_api::manager::{Scope, User};
use berth_model::access::Action;
use berth_model::{Problem, ProblemCode, SegmentId, TeamId, Timestamp};

use super::book::{Book, Guard, Held};
use super::{Policies, PolicyError, Resource};
use crate::auth::{Principal, UserPrincipal};
use crate::door::target::segment_resource;
use crate::records::Row;

/// Something that would be given.
#[derive(Debug, Clone)]
pub struct Gift {
    /// These actions.
    pub actions: Vec<Action>,
    /// In this segment and those inside it; none: everywhere.
    pub segment: Option<SegmentId>,
    /// Until then; none: for good.
    pub until: Option<Timestamp>,
}

impl From<&Held> for Gift {
    fn from(held: &Held) -> Self {
        Self { actions: held.actions.clone(), segment: held.grant.segment.clone(), until: held.grant.until }
    }
}

impl Policies {
    /// Refuses unless `giver` holds all of it itself.
    ///
    /// # Errors
    /// [`ProblemCode::NotAllowed`], naming the first action that it does not hold.
    pub fn may_give(&self, giver: &Principal, gifts: &[Gift]) -> Result<(), Problem> {
        let failed = |error: PolicyError| Problem::new(ProblemCode::Internal, error.to_string());
        let book = self.book().map_err(failed)?;
        let now = self.now();
        let slice = self.slice(&book, giver);
        let grants = slice.as_ref().map(|slice| slice.grants.as_slice()).unwrap_or_default();
        let live: Vec<&Held> = grants.iter().map(AsRef::as_ref).filter(|held| held.is_live(now)).collect();
        let mut ids: Vec<&str> = slice.iter().flat_map(|slice| &slice.teams).map(TeamId::as_str).collect();
        if let Principal::User(user) = giver {
            ids.push(user.id.as_str());
        }
        let guards = book.guards_naming(&ids);
        for gift in gifts.iter().filter(|gift| gift.until.is_none_or(|until| now < until)) {
            for action in &gift.actions {
                if !in_scope(&book, giver, *action, gift)
                    || !live.iter().any(|held| covers(&book, held, *action, gift))
                    || self.is_kept_from(&guards, giver, *action, gift)
                {
                    return Err(self.lacking(&book, giver, *action, gift));
                }
            }
        }
        Ok(())
    }

    /// Whether a written policy keeps the giver in person from what was granted. Somebody else is not kept from it, so
    /// it must not be passed on. What is forbidden to everybody can be given: it does them no good.
    fn is_kept_from(&self, guards: &[Guard], giver: &Principal, action: Action, gift: &Gift) -> bool {
        let mut naming = guards.iter().filter(|guard| guard.actions.contains(&action)).peekable();
        if naming.peek().is_none() {
            return false;
        }
        let place = match &gift.segment {
            Some(segment) => segment_resource(&self.cluster, segment),
            None => Resource::cluster(),
        };
        naming.any(|guard| guard.is_against)
            || (self.engine.can_be_asked(giver, action, place.kind())
                && !self.look(giver, action, &place, true).allowed)
    }

    /// All that a user's credentials are worth.
    ///
    /// # Errors
    /// When the policies can't be read.
    pub fn worth_of(&self, user: &Row<User>) -> Result<Vec<Gift>, Problem> {
        let failed = |error: PolicyError| Problem::new(ProblemCode::Internal, error.to_string());
        let book = self.book().map_err(failed)?;
        let slice = book.slice(user);
        let mut ids = vec![user.value.id.as_str()];
        ids.extend(slice.teams.iter().map(TeamId::as_str));
        let granted = slice.grants.iter().map(|held| Gift::from(&**held));
        Ok(granted.chain(hung_on(&book, &ids)).collect())
    }

    /// All that membership in a team is worth.
    ///
    /// # Errors
    /// When the policies can't be read.
    pub fn worth_of_team(&self, team: &TeamId) -> Result<Vec<Gift>, Problem> {
        let failed = |error: PolicyError| Problem::new(ProblemCode::Internal, error.to_string());
        let book = self.book().map_err(failed)?;
        let teams = book.team_chain(team);
        let grants = teams.iter().flat_map(|team| book.grants_of_team(team));
        let granted = grants.map(|held| Gift::from(&**held));
        let ids: Vec<&str> = teams.iter().map(TeamId::as_str).collect();
        Ok(granted.chain(hung_on(&book, &ids)).collect())
    }

    /// What written policies make of membership in a team. A policy may give to those who are in it, or take from
    /// them: so it counts both for who comes in and for who goes out.
    ///
    /// # Errors
    /// When the policies can't be read.
    pub fn policies_on_team(&self, team: &TeamId) -> Result<Vec<Gift>, Problem> {
        let book = self.book().map_err(|error| Problem::new(ProblemCode::Internal, error.to_string()))?;
        let teams = book.team_chain(team);
        let ids: Vec<&str> = teams.iter().map(TeamId::as_str).collect();
        Ok(hung_on(&book, &ids).into_iter().collect())
    }

    fn lacking(&self, book: &Book, giver: &Principal, action: Action, gift: &Gift) -> Problem {
        let seen = |segment: &SegmentId| {
            let resource = segment_resource(&self.cluster, segment);
            self.look(giver, Action::SegmentView, &resource, false).allowed
        };
        let place = match &gift.segment {
            Some(segment) if seen(segment) => format!("in segment {}", book.segment_name(segment)),
            Some(_) => "in a segment that is not shown to it".to_owned(),
            None => "in the whole cluster".to_owned(),
        };
        let until = gift.until.map_or_else(|| " for good".to_owned(), |until| format!(" until {until}"));
        Problem::new(
            ProblemCode::NotAllowed,
            format!(
                "{} can't give '{}' {place}{until}: only what one holds oneself can be given",
                giver.actor(),
                action.as_str()
            ),
        )
    }
}

/// What written policies that name one of these are about, as something that would be given everywhere: where they
/// give or take it, only their conditions know.
fn hung_on(book: &Book, ids: &[&str]) -> Option<Gift> {
    let actions = book.actions_hung_on(ids).into_iter().filter(|action| action.is_grantable());
    let actions: Vec<Action> = actions.collect();
    (!actions.is_empty()).then_some(Gift { actions, segment: None, until: None })
}

/// Whether one grant holds an action wherever and as long as the gift has it.
fn covers(book: &Book, held: &Held, action: Action, gift: &Gift) -> bool {
    let everywhere_it_is = match (&held.grant.segment, &gift.segment) {
        (None, _) => true,
        (Some(_), None) => false,
        (Some(mine), Some(wanted)) => book.segment_chain(wanted).contains(mine),
    };
    let as_long = match (held.grant.until, gift.until) {
        (None, _) => true,
        (Some(_), None) => false,
        (Some(mine), Some(wanted)) => wanted <= mine,
    };
    everywhere_it_is && as_long && held.actions.contains(&action)
}

/// Whether the giver's token reaches that far.
fn in_scope(book: &Book, giver: &Principal, action: Action, gift: &Gift) -> bool {
    let Principal::User(UserPrincipal { scope, .. }) = giver else { return false };
    let Some(Scope { actions, segment }) = scope else { return true };
    let segment_fits = match (segment, &gift.segment) {
        (None, _) => true,
        (Some(_), None) => false,
        (Some(mine), Some(wanted)) => book.segment_chain(wanted).contains(mine),
    };
    segment_fits && actions.contains(&action)
}
