//! Somebody whom another system vouches for: an identity provider, or a directory.

use berth_model::name::Name;

/// Longest subject, in bytes (OpenID Connect Core, section 2: `sub`).
pub const SUBJECT_BYTES_MAX: usize = 255;
/// Longest name of a group that is taken over, in bytes.
const GROUP_BYTES_MAX: usize = 512;
/// Most groups that are taken over. More, and who somebody is can't be said in a record.
pub const GROUPS_MAX: usize = 1000;

/// Who somebody is elsewhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct External {
    /// What the provider or directory is called here.
    pub source: Name,
    /// What makes the subject unique: the issuer, or the directory's name.
    pub issuer: String,
    /// Who it is there, for good: never an e-mail address or a name.
    pub subject: String,
    /// What the user is called there, to make a name of.
    pub name: Option<String>,
    /// The groups there.
    pub groups: Vec<String>,
}

/// Groups without those that can't be one, sorted, each once; none: there are more than can be taken over.
pub fn tidy_groups(groups: Vec<String>) -> Option<Vec<String>> {
    let is_group = |group: &String| {
        !group.is_empty() && group.len() <= GROUP_BYTES_MAX && !group.chars().any(char::is_control)
    };
    let mut groups: Vec<String> = groups.into_iter().filter(is_group).collect();
    groups.sort();
    groups.dedup();
    (groups.len() <= GROUPS_MAX).then_some(groups)
}
