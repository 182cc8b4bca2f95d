//! The table of roles and actions in `docs/permissions.md` is made from the roles, so that it can't be wrong. When the
//! roles have changed, `BERTH_BLESS=1` writes it anew.

use std::path::Path;

use berth_model::access::{Action, ActionGroup, BUILT_IN_ROLES};

const BEGIN: &str = "<!-- made by crates/model/tests/permissions_document.rs: begin -->\n";
const END: &str = "<!-- end -->";

fn table() -> String {
    let mut text = String::from("| action | what it is |");
    for role in BUILT_IN_ROLES {
        text.push_str(&format!(" {} |", role.name));
    }
    text.push_str("\n|---|---|");
    text.push_str(&":-:|".repeat(BUILT_IN_ROLES.len()));
    text.push('\n');
    for group in ActionGroup::GRANTABLE {
        text.push_str(&format!("| **{}** | |{}\n", group.as_str(), " |".repeat(BUILT_IN_ROLES.len())));
        for action in Action::ALL.iter().filter(|action| action.group() == group) {
            text.push_str(&format!("| `{}` | {} |", action.as_str(), action.meaning().trim()));
            for role in BUILT_IN_ROLES {
                text.push_str(if role.has(*action) { " ● |" } else { " |" });
            }
            text.push('\n');
        }
    }
    text
}

#[test]
fn the_table_of_roles_and_actions_is_what_the_roles_are() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/permissions.md");
    let document = std::fs::read_to_string(&path).expect("docs/permissions.md");
    let (head, rest) = document.split_once(BEGIN).expect("a beginning of the table");
    let (there, tail) = rest.split_once(END).expect("an end of the table");
    let right = table();
    if std::env::var_os("BERTH_BLESS").is_some() {
        std::fs::write(&path, format!("{head}{BEGIN}{right}{END}{tail}")).expect("written");
        return;
    }
    assert!(
        there == right,
        "docs/permissions.md has another table than the roles: run this with BERTH_BLESS=1"
    );
}

#[test]
fn every_role_and_every_group_is_said_in_words() {
    let document = include_str!("../../../docs/permissions.md");
    for role in BUILT_IN_ROLES {
        assert!(document.contains(&format!("| `{}` | {} |", role.name, role.summary)), "{}", role.name);
    }
    for group in ActionGroup::GRANTABLE {
        assert!(document.contains(&format!("| `{}` |", group.as_str())), "{}", group.as_str());
    }
}
