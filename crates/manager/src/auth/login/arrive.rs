//! From who somebody is elsewhere to a user here.
//!
//! Found by issuer and subject, never by a name or an e-mail address: those change hands. Who is not known yet
//! becomes a user if the provider may make users, under a name that nobody here has.

use std::sync::Arc;

use berth_api::manager::{CreateUser, ExternalGroup, User};
use berth_model::name::{NAME_RULE, Name};
use berth_model::{Problem, ProblemCode, Timestamp, UserId};

use crate::auth::accounts;
use crate::auth::credential::IdentityRow;
use crate::auth::external::External;
use crate::cluster::Cluster;
use crate::records::{RecordsError, Row, Transaction};

/// The user that this is, made if need be, with the groups of this moment.
///
/// # Errors
/// That nobody here is this and nobody may be made; that the name is taken or can't be one; that the user is disabled.
pub(super) async fn arrive(
    cluster: &Arc<Cluster>,
    external: &External,
    create: bool,
    now: Timestamp,
) -> Result<UserId, Problem> {
    let records = &cluster.records;
    let id = IdentityRow::id_of(&external.issuer, &external.subject);
    let known = records.get::<IdentityRow>(&id).and_then(|row| records.get::<User>(row.user.as_str()));
    let Some(user) = known else {
        return if create { make(cluster, external, now).await } else { Err(nobody(external)) };
    };
    if user.disabled {
        return Err(super::wrong());
    }
    take_groups(cluster, &user, external).await?;
    Ok(user.value.id.clone())
}

/// The groups of this provider are those that it says now; those of others stay.
async fn take_groups(
    cluster: &Arc<Cluster>,
    user: &Arc<Row<User>>,
    external: &External,
) -> Result<(), Problem> {
    let groups = groups(external);
    cluster
        .records
        .update::<User, Problem>(user.value.id.as_str(), |user| {
            user.external_groups.retain(|group| group.provider != external.source.as_str());
            user.external_groups.extend(groups.iter().cloned());
            user.external_groups.sort();
            Ok(())
        })
        .await
        .map(drop)
}

fn groups(external: &External) -> Vec<ExternalGroup> {
    let provider = external.source.to_string();
    let group = |group: &String| ExternalGroup { provider: provider.clone(), group: group.clone() };
    external.groups.iter().map(group).collect()
}

async fn make(cluster: &Arc<Cluster>, external: &External, now: Timestamp) -> Result<UserId, Problem> {
    let given = external.name.clone().unwrap_or_default();
    let name: Name = given.to_lowercase().parse().map_err(|_| {
        let message =
            format!("{} calls this user '{}', which can't be a name here", external.source, shorten(&given));
        Problem::new(ProblemCode::NotAllowed, message).at("name", shorten(&given), NAME_RULE)
    })?;
    let mut user = accounts::new_user(CreateUser { name: name.clone() }, &*cluster.entropy, now);
    user.external_groups = groups(external);
    let mut transaction = Transaction::new();
    accounts::add_user(&mut transaction, &user);
    transaction.put(&IdentityRow::of(external, user.id.clone(), now));
    match cluster.records.commit(transaction).await {
        Ok(_) => Ok(user.id),
        // Also when the same person came twice at once: the second time, the identity is known.
        Err(RecordsError::Taken { .. }) => {
            let message = format!(
                "{} calls this user '{name}', and somebody else here has that name: an administrator can say that it \
                 is the same with 'berth user link {name} --source {} --subject {}'",
                external.source,
                external.source,
                shorten(&external.subject)
            );
            Err(Problem::new(ProblemCode::NotAllowed, message))
        }
        Err(error) => Err(error.into()),
    }
}

fn nobody(external: &External) -> Problem {
    let (source, subject) = (&external.source, shorten(&external.subject));
    let message = format!(
        "{source} knows this user, and nobody here is it: an administrator can say who with \
         'berth user link USER --source {source} --subject {subject}'"
    );
    Problem::new(ProblemCode::NotAllowed, message)
}

fn shorten(text: &str) -> String {
    text.chars().filter(|letter| !letter.is_control()).take(100).collect()
}
