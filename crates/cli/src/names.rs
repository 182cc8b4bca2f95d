//! Names for ids in answers: who may not see a thing sees its id, so nothing here fails.
//!
//! They are asked for only when people read the answer; programs get the ids that the manager gave.

use std::collections::HashMap;
use std::fmt::Display;

use berth_api::endpoint::{Endpoint, Nothing};
use berth_api::manager::{Page, PageQuery, SegmentList, TeamList, UserList};
use berth_model::name::Name;

use crate::output::{Format, NOTHING};
use crate::session::Session;

/// Names of things of one kind, by id.
#[derive(Debug, Default)]
pub struct Names(HashMap<String, Name>);

impl Names {
    /// The segments that the caller may see.
    pub async fn of_segments(session: &Session) -> Self {
        Self::load::<SegmentList, _>(session, |segment| (segment.id.to_string(), segment.name)).await
    }

    /// The teams that the caller may see.
    pub async fn of_teams(session: &Session) -> Self {
        Self::load::<TeamList, _>(session, |team| (team.id.to_string(), team.name)).await
    }

    /// The users that the caller may see.
    pub async fn of_users(session: &Session) -> Self {
        Self::load::<UserList, _>(session, |user| (user.id.to_string(), user.name)).await
    }

    async fn load<E, T>(session: &Session, pair: impl Fn(T) -> (String, Name)) -> Self
    where
        E: Endpoint<Path = Nothing, Query = PageQuery, Body = (), Reply = Page<T>>,
    {
        if session.output.format() != Format::Table {
            return Self::default();
        }
        let query = |limit, cursor| PageQuery { limit, cursor };
        let all = session.pages::<E, T>(&Nothing {}, None, query).await.unwrap_or_default();
        Self(all.into_iter().map(pair).collect())
    }

    /// The name, else the id.
    pub fn of(&self, id: &impl Display) -> String {
        let id = id.to_string();
        self.0.get(&id).map_or(id, Name::to_string)
    }

    /// The same for what may not be: the word for none then.
    pub fn of_some(&self, id: Option<&impl Display>) -> String {
        id.map_or_else(|| NOTHING.to_owned(), |id| self.of(id))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::Fake;
    use berth_model::{Problem, ProblemCode, SegmentId};

    #[tokio::test]
    async fn who_may_not_see_names_sees_ids() {
        let denied = Problem::new(ProblemCode::NotAllowed, "no");
        let fake = Fake::new().refuse("GET /v1/segments", &denied);
        let names = Names::of_segments(&fake.session()).await;
        let id = SegmentId::from_entropy([1; 10]);
        assert_eq!(names.of(&id), id.to_string());
        assert_eq!(names.of_some(None::<&SegmentId>), NOTHING);
    }

    #[tokio::test]
    async fn programs_get_ids_and_nothing_more_is_asked_for_them() {
        let fake = Fake::new();
        Names::of_teams(&fake.session_in(Format::Json)).await;
        assert!(fake.asked().is_empty());
    }
}
