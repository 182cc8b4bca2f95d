use std::collections::BTreeSet;

use super::*;
use crate::auth::UserPrincipal;

fn admin() -> Principal {
    Principal::User(UserPrincipal {
        id: berth_model::UserId::from_entropy([1; 10]),
        name: "root".parse().expect("a name"),
        roles: vec!["admin".to_owned()],
        token: berth_model::TokenId::from_entropy([2; 10]),
    })
}

#[test]
fn the_schema_has_the_actions_of_the_api_and_no_others() {
    let policies = Policies::built_in().expect("valid policies");
    let in_schema: BTreeSet<String> =
        policies.schema.actions().map(|uid| uid.id().unescaped().to_owned()).collect();
    let in_api: BTreeSet<String> = Action::ALL.iter().map(|action| action.as_str().to_owned()).collect();
    assert_eq!(in_schema, in_api);
}

#[test]
fn a_policy_that_does_not_fit_the_schema_stops_the_manager() {
    for bad in [
        "@id(\"x\") permit (principal, action == Action::\"vm.fly\", resource);",
        "@id(\"x\") permit (principal, action == Action::\"vm.view\", resource) when { resource.owner == principal };",
        "permit (principal, action == Action::\"public\", resource);",
        "@id(\"x\") permit (principal, action",
    ] {
        assert!(Policies::from_text(SCHEMA, bad).is_err(), "{bad}");
    }
}

#[test]
fn an_error_while_deciding_denies_even_what_another_policy_permits() {
    let broken = "@id(\"guard\") forbid (principal is User, action == Action::\"vm.view\", resource)
        when { 9223372036854775807 + 1 == 0 };";
    let policies =
        Policies::from_text(SCHEMA, &format!("{POLICIES}{broken}")).expect("valid, but it overflows");
    let decision = policies.decide(&admin(), Action::VmView, &Resource::absent(ResourceKind::Vm, "x"));
    assert!(!decision.allowed, "Cedar skips a forbid that fails: {}", decision.reason);
    assert!(policies.decide(&admin(), Action::VmStart, &Resource::absent(ResourceKind::Vm, "x")).allowed);
}

#[test]
fn a_reason_names_the_policy() {
    let policies = Policies::built_in().expect("valid policies");
    let decision = policies.decide(&admin(), Action::HostView, &Resource::cluster());
    assert_eq!(decision.reason, "policy 'administrators-may-everything' permits it");
}

#[test]
fn a_user_may_be_what_is_acted_on_as_well() {
    let policies = Policies::built_in().expect("valid policies");
    let Principal::User(user) = admin() else { unreachable!("a user") };
    let oneself = Resource::of_cluster(ResourceKind::User, user.id.as_str(), "root");
    assert!(policies.decide(&admin(), Action::UserManage, &oneself).allowed);
}

#[test]
fn a_decision_is_quick_enough_for_every_request() {
    let policies = Policies::built_in().expect("valid policies");
    let vm = Resource::absent(ResourceKind::Vm, "x");
    let start = std::time::Instant::now();
    for _ in 0..100 {
        assert!(policies.decide(&admin(), Action::VmView, &vm).allowed);
    }
    // Measured: 15 µs optimised. The bound is for a slow build on a busy machine, to catch something quadratic.
    assert!(start.elapsed() < std::time::Duration::from_secs(2), "{:?}", start.elapsed() / 100);
}
