mod giving;
mod lists;

use std::collections::BTreeSet;

use super::*;
use crate::door::tests::access::principal_of;
use crate::door::tests::support::Fixture;

fn admin(fixture: &Fixture) -> Principal {
    principal_of(&crate::door::target::user(fixture.cluster(), "admin").expect("the first administrator"))
}

#[test]
fn the_schema_has_the_actions_of_the_api_and_no_others() {
    let in_schema = Engine::new().expect("a schema").action_names();
    let in_api: BTreeSet<String> = Action::ALL.iter().map(|action| action.as_str().to_owned()).collect();
    assert_eq!(in_schema, in_api);
}

#[test]
fn a_policy_that_does_not_fit_the_schema_is_refused() {
    let engine = Engine::new().expect("a schema");
    for bad in [
        "permit (principal, action == Action::\"vm.fly\", resource);",
        "permit (principal, action == Action::\"vm.view\", resource) when { resource.owner == principal };",
        "permit (principal == ?principal, action, resource);",
        "permit (principal, action",
    ] {
        assert!(engine.read(bad).is_err(), "{bad}");
    }
}

#[tokio::test]
async fn a_reason_names_the_grant_with_its_team_role_and_place() {
    let fixture = Fixture::new().await;
    let policies = &fixture.manager.gate().policies;
    let decision = policies.decide(&admin(&fixture), Action::HostView, &Resource::cluster(), false);
    assert!(decision.allowed);
    assert!(decision.reason.ends_with("(team administrators, role admin, cluster)"), "{}", decision.reason);
    assert!(decision.by[0].starts_with("g-"), "{:?}", decision.by);
}

#[tokio::test]
async fn what_is_handed_to_cedar_fits_the_schema() {
    let fixture = Fixture::new().await;
    let policies = &fixture.manager.gate().policies;
    let principal = admin(&fixture);
    let book = policies.book().expect("a book");
    let slice = policies.slice(&book, &principal).expect("a user's");
    let now = fixture.cluster().clock.now();
    for action in Action::ALL {
        for kind in policies.engine().kinds_for(&principal, *action) {
            let resource = Resource::absent(kind, "x");
            let (principal, teams) = (&principal, slice.teams.as_slice());
            let question =
                Question { principal, teams, action: *action, resource: &resource, approved: false, now };
            policies.engine().check(&question).unwrap_or_else(|error| panic!("{action:?} {kind:?}: {error}"));
        }
    }
}
