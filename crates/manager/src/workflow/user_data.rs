//! cloud-init user data: checked before a VM is made, because a guest that can't read it says so only on its console.

use berth_model::Problem;

const CLOUD_CONFIG: &str = "#cloud-config";
const SCRIPT: &str = "#!";
/// First lines of the other kinds that cloud-init knows; what follows them is its own to judge.
const OTHERS: [&str; 7] = [
    "#include",
    "#cloud-boothook",
    "#part-handler",
    "#cloud-config-archive",
    "## template:",
    "content-type:",
    "mime-version:",
];
const EXPECTED: &str = "'#cloud-config' followed by a YAML mapping, a script that begins with '#!', or another of \
                        cloud-init's own first lines";

/// Checks user data.
///
/// # Errors
/// When it is neither a cloud-config that YAML can read, nor a script, nor of another kind that cloud-init knows.
pub(super) fn check(text: &str) -> Result<(), Problem> {
    let first = text.lines().next().unwrap_or_default().trim_end();
    let lower = first.to_ascii_lowercase();
    if first.starts_with(SCRIPT) && first.len() > SCRIPT.len()
        || OTHERS.iter().any(|head| lower.starts_with(head))
    {
        return Ok(());
    }
    if first != CLOUD_CONFIG {
        return Err(Problem::field("user_data", first, EXPECTED));
    }
    match serde_yaml_ng::from_str::<serde_yaml_ng::Value>(text) {
        Ok(serde_yaml_ng::Value::Mapping(_) | serde_yaml_ng::Value::Null) => Ok(()),
        Ok(_) => Err(Problem::field("user_data", first, EXPECTED)),
        Err(error) => {
            // What is never closed is noticed behind the end.
            let last = || text.lines().rfind(|line| !line.trim().is_empty());
            let line = error.location().map(|place| text.lines().nth(place.line().saturating_sub(1)));
            let line = line.and_then(|line| line.or_else(last));
            Err(Problem::field("user_data", line.unwrap_or(first).trim(), format!("valid YAML ({error})")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cloud_configs_and_scripts_are_taken() {
        for good in [
            "#cloud-config\nhostname: books\n",
            "#cloud-config\r\npackages: [nginx]\r\n",
            "#cloud-config\n",
            "#!/bin/sh\necho hello\n",
            "#include\nhttps://example.org/config\n",
            "Content-Type: multipart/mixed; boundary=x\n",
        ] {
            assert!(check(good).is_ok(), "{good}");
        }
    }

    #[test]
    fn anything_else_is_refused_and_named() {
        for bad in [
            "",
            "hostname: books",
            "#cloud-config\n- a\n- list\n",
            "#cloud-config\nhostname: [books\n",
            "#cloud-config\n\tx: tabs\n",
            "#cloud-confg\nhostname: books\n",
            "#!",
        ] {
            let problem = check(bad).expect_err(bad);
            assert_eq!(problem.field.as_deref(), Some("user_data"), "{bad}");
        }
    }

    #[test]
    fn a_tower_of_brackets_or_aliases_does_no_harm() {
        let deep = format!("#cloud-config\na: {}", "[".repeat(10_000));
        assert!(check(&deep).is_err());
        let mut laughs = String::from("#cloud-config\na0: &a0 [x, x]\n");
        for level in 1..40 {
            let below = level - 1;
            laughs.push_str(&format!("a{level}: &a{level} [*a{below}, *a{below}, *a{below}, *a{below}]\n"));
        }
        // Whether it is taken or not does not matter; that an answer comes does.
        let _ = check(&laughs);
    }
}
