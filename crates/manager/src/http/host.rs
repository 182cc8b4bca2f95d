//! Hosts: seeing them, letting new ones join, and letting old ones go.

use berth_api::manager::{HostDelete, HostList, HostShow, JoinToken, JoinTokenCreate, Page};
use berth_model::access::Action;
use berth_model::host::Host;
use berth_model::vm::Vm;
use berth_model::{Problem, ProblemCode};

use super::list;
use crate::auth::accounts;
use crate::cluster::Cluster;
use crate::door::target::{self, TheCluster, TheHost, TheList};
use crate::door::{Answer, Call, Door};
use crate::records::{Debt, ImagePlace, Record, Transaction, UniqueName};

/// Mounts the routes of this file.
pub fn mount(door: Door) -> Door {
    door.mount(show_all).mount(show).mount(delete).mount(create_join_token)
}

async fn show_all(call: Call<HostList, TheList>) -> Result<Answer<Page<Host>>, Problem> {
    let visible = call.ctx.visible(Action::HostView);
    let mut all = call.ctx.cluster().records.list::<Host>();
    all.retain(|row| visible.shows(None, || target::host_resource(row)));
    all.sort_by(|a, b| a.name.cmp(&b.name));
    let query = &call.input.query;
    let page = list::page(
        &all,
        query.limit,
        query.cursor.as_deref(),
        |row| row.value.name.to_string(),
        |row| row.value.clone(),
    )?;
    Ok(Answer::new(page))
}

async fn show(call: Call<HostShow, TheHost>) -> Result<Answer<Host>, Problem> {
    let TheHost(host) = call.target;
    Ok(Answer::new(host.value.clone()).at(host.revision))
}

async fn delete(call: Call<HostDelete, TheHost>) -> Result<Answer<()>, Problem> {
    let (cluster, TheHost(host)) = (call.ctx.cluster(), call.target);
    // Nothing may be placed on it between the look and the deed.
    let _deciding = cluster.deciding().await;
    let id = &host.value.id;
    let vms = cluster.records.list::<Vm>();
    let coming = cluster.operations.targets();
    let here =
        vms.iter().find(|vm| vm.status.host.as_ref() == Some(id) || coming.get(&vm.value.id) == Some(id));
    if let Some(vm) = here {
        let message =
            format!("host {} still has VM {}: move or delete its VMs first", host.name, vm.full_name());
        return Err(Problem::new(ProblemCode::Protected, message).at(
            "host",
            &host.name,
            "a host without VMs",
        ));
    }
    let mut transaction = Transaction::new();
    // Its record changes with each report: what counts is that nothing is on it.
    transaction.forget::<Host>(id.as_str());
    transaction.release(&UniqueName::in_cluster(Host::NOUN, &host.name));
    forget_what_went_with_it(cluster, &host, &mut transaction);
    cluster.records.commit(transaction).await?;
    Ok(Answer::new(()))
}

/// What was still to be removed from the host, and the images in pools that nobody else sees.
fn forget_what_went_with_it(cluster: &Cluster, host: &Host, transaction: &mut Transaction) {
    for debt in cluster.records.list_below::<Debt>(&format!("{}/", host.id)) {
        if !transaction.is_full() {
            transaction.forget::<Debt>(&debt.id);
        }
    }
    let others = cluster.records.list::<Host>();
    let seen_elsewhere = |pool_uuid: &str| {
        let others = others.iter().filter(|other| other.value.id != host.id);
        let mut pools =
            others.filter_map(|other| other.inventory.as_ref()).flat_map(|inventory| &inventory.pools);
        pools.any(|pool| pool.pool_uuid == pool_uuid)
    };
    let own = host.inventory.iter().flat_map(|inventory| &inventory.pools);
    let lost: Vec<&str> =
        own.map(|pool| pool.pool_uuid.as_str()).filter(|pool_uuid| !seen_elsewhere(pool_uuid)).collect();
    for place in cluster.records.list::<ImagePlace>() {
        if lost.contains(&place.pool_uuid.as_str()) && !transaction.is_full() {
            transaction.forget::<ImagePlace>(&place.id);
        }
    }
}

async fn create_join_token(call: Call<JoinTokenCreate, TheCluster>) -> Result<Answer<JoinToken>, Problem> {
    let (ctx, wish) = (&call.ctx, call.input.body);
    let cluster = ctx.cluster();
    let (row, secret) =
        accounts::new_join_token(wish.expires_s, ctx.actor(), ctx.gate().ca, &*cluster.entropy, ctx.now())?;
    let mut transaction = Transaction::new();
    transaction.create(&row);
    cluster.records.commit(transaction).await?;
    Ok(Answer::new(JoinToken { token: secret.to_string(), expires_at: row.expires_at }))
}
