//! The very first start: an administrator, the token for it, and a segment to put VMs in.
//!
//! The token is shown before it is recorded. A manager that dies in between has shown one that is no good, and shows
//! another at its next start; the other way round it could have recorded one that nobody has ever seen.

use std::io::Write;
use std::path::Path;

use berth_api::manager::{CreateToken, CreateUser, Grant, Team, TokenKind, User};
use berth_model::name::Name;
use berth_model::{GrantId, TeamId};

use super::{RunError, certificates};
use crate::auth::accounts;
use crate::cluster::Cluster;
use crate::http::segment;
use crate::records::{Record, RecordsError, Transaction, UniqueName};

/// What the first administrator is called.
const ADMIN: &str = "admin";
/// The team that the first administrator is in, and that may do everything. Its name has no meaning: its grant has.
const TEAM: &str = "administrators";
/// The segment that is there from the start.
const SEGMENT: &str = "default";

/// What is to be made at the first start.
pub struct FirstStart {
    secret: String,
    transaction: Transaction,
}

impl FirstStart {
    /// The first administrator's bearer secret.
    pub fn secret(&self) -> &str {
        &self.secret
    }

    /// Records it all, in one transaction.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn commit(self, cluster: &Cluster) -> Result<(), RecordsError> {
        cluster.records.commit(self.transaction).await.map(drop)
    }
}

/// Makes what is missing; none: there are users already.
pub(super) fn prepare(cluster: &Cluster) -> Option<FirstStart> {
    if !cluster.records.list::<User>().is_empty() {
        return None;
    }
    let (entropy, now) = (&*cluster.entropy, cluster.clock.now());
    let name = |text: &str| -> Name { text.parse().expect("a name that keeps the rule") };
    let user = accounts::new_user(CreateUser { name: name(ADMIN) }, entropy, now);
    let wish = CreateToken { note: "made at the first start".to_owned(), ..CreateToken::default() };
    let (row, token) =
        accounts::new_token(&user.id, TokenKind::First, None, &wish, entropy, now).expect("a wish in range");
    let team = Team {
        id: TeamId::from_entropy(entropy.id()),
        name: name(TEAM),
        parent: None,
        members: vec![user.id.clone()],
        external_groups: Vec::new(),
        created_at: now,
    };
    let grant = Grant {
        id: GrantId::from_entropy(entropy.id()),
        team: Some(team.id.clone()),
        user: None,
        role: name(accounts::ADMIN),
        segment: None,
        until: None,
        note: "made at the first start".to_owned(),
        granted_by: "system:first-start".to_owned(),
        created_at: now,
    };
    let mut transaction = Transaction::new();
    accounts::add_user(&mut transaction, &user);
    transaction.create(&row);
    transaction.create(&team);
    transaction.claim(&UniqueName::in_cluster(Team::NOUN, &team.name), team.id.as_str());
    transaction.create(&grant);
    segment::add_segment(&mut transaction, &segment::new_segment(name(SEGMENT), entropy, now));
    Some(FirstStart { secret: token.secret, transaction })
}

/// Shows the token: in the file, if one is named, else on the terminal.
pub(super) fn announce(first: &FirstStart, file: Option<&Path>) -> Result<(), RunError> {
    match file {
        Some(path) => certificates::write_private(path, format!("{}\n", first.secret).as_bytes()),
        None => {
            let text = format!(
                "The first administrator's token, shown this once:\n\n    {}\n\nSign in with 'berth login'.\n",
                first.secret
            );
            let failed =
                |source| RunError::File { doing: "write to", path: "standard output".into(), source };
            let mut out = std::io::stdout().lock();
            out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(failed)
        }
    }
}
