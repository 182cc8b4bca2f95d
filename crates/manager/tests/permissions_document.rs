//! What `docs/permissions.md` says of policies is true: its examples pass the same strict validation that the manager
//! makes, and every guard that holds everywhere is listed.

use cedar_policy::{Effect, PolicySet, Schema, ValidationMode, Validator};

const DOCUMENT: &str = include_str!("../../../docs/permissions.md");

fn examples() -> Vec<&'static str> {
    let parts = DOCUMENT.split("```cedar\n").skip(1);
    parts.map(|part| part.split_once("```").expect("an end of the example").0).collect()
}

#[test]
fn the_examples_fit_the_schema_without_a_warning() {
    let (schema, _) =
        Schema::from_cedarschema_str(include_str!("../policy/schema.cedarschema")).expect("the schema");
    let validator = Validator::new(schema);
    let examples = examples();
    assert!(examples.len() >= 3, "{} examples", examples.len());
    for text in examples {
        let set: PolicySet = text.parse().unwrap_or_else(|error| panic!("{text}\n{error:?}"));
        let checked = validator.validate(&set, ValidationMode::Strict);
        assert!(checked.validation_passed_without_warnings(), "{text}\n{checked}");
    }
}

#[test]
fn every_guard_that_holds_everywhere_is_listed() {
    let set: PolicySet = include_str!("../policy/policies.cedar").parse().expect("the policies");
    for policy in set.policies().filter(|policy| policy.effect() == Effect::Forbid) {
        let id = policy.annotation("id").expect("an id");
        assert!(DOCUMENT.contains(&format!("| `{id}` |")), "{id} is not listed");
    }
}
