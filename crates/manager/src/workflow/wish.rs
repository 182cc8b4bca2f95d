//! What a wish for a VM comes to: defaults filled in, names looked up, addresses given, a host chosen.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::sync::Arc;

use berth_api::manager::{CreateVm, NewNic, Segment};
use berth_model::host::{Host, HostState};
use berth_model::image::{Image, ImageState, PartRole};
use berth_model::name::Name;
use berth_model::placement;
use berth_model::vm::{NICS_MAX, Nic, Vm, VmSpec, standard_class};
use berth_model::{HostId, Problem, ProblemCode};

use super::vm::with_candidates;
use super::{image, reach, user_data};
use crate::cluster::Cluster;
use crate::records::Row;

const VCPUS_DEFAULT: u32 = 1;
const MEMORY_MIB_DEFAULT: u64 = 1024;
/// Smallest disk that is made when nobody says, in MiB: below it distributions fill their disk with their logs.
const DISK_MIB_DEFAULT_MIN: u64 = 1024;
const READY_TIMEOUT_S_DEFAULT: u32 = 300;
const MIB: u64 = 1024 * 1024;
/// The family of machine types that Berth's set of devices is made for.
const MACHINE_FAMILY: &str = "pc-q35-";
/// CPU models that are tried in this order when nobody says: old enough to be offered by any host's QEMU, new enough
/// for distributions that want x86-64-v2.
const CPU_MODELS: [&str; 4] = ["Nehalem", "qemu64", "kvm64", "max"];
/// What a request says for an interface whose guest asks for its address.
pub(super) const DHCP: &str = "dhcp";

/// The whole specification.
pub(super) fn spec(
    cluster: &Cluster,
    wish: &CreateVm,
    image: &Image,
    number: u32,
) -> Result<VmSpec, Problem> {
    let hosts = online(cluster);
    let spec = VmSpec {
        vcpus: wish.vcpus.unwrap_or(VCPUS_DEFAULT),
        memory_mib: wish.memory_mib.unwrap_or(MEMORY_MIB_DEFAULT),
        disk_mib: disk_mib(wish, image)?,
        data_disks_mib: wish.data_disks_mib.clone(),
        image: image.id.clone(),
        pool: wish.pool.clone().unwrap_or_else(default_pool),
        machine_type: machine_type(wish, &hosts)?,
        firmware: wish.firmware.unwrap_or_default(),
        tpm: wish.tpm,
        cpu_model: cpu_model(wish, &hosts)?,
        nics: nics(cluster, wish, number)?,
        user_data: wish.user_data.clone(),
        protected: wish.protected,
        class: wish.class.clone().unwrap_or_else(standard_class),
        ready_timeout_s: wish.ready_timeout_s.unwrap_or(READY_TIMEOUT_S_DEFAULT),
        isolated: false,
    };
    spec.check()?;
    if let Some(text) = &spec.user_data {
        user_data::check(text)?;
    }
    let all = cluster.records.list::<Host>();
    let inventories: Vec<_> = all.iter().filter_map(|host| host.inventory.as_ref()).collect();
    reach::check(&spec, &inventories)?;
    Ok(spec)
}

/// The host it is to be on.
pub(super) fn host(cluster: &Cluster, wish: &CreateVm, spec: &VmSpec) -> Result<HostId, Problem> {
    let hosts = match &wish.host {
        Some(named) => vec![cluster.records.find_host(named)?],
        None => cluster.records.list::<Host>(),
    };
    let named = wish.host.as_ref().and(hosts.first()).map_or("any", |host| host.name.as_str());
    let chosen = with_candidates(cluster, &hosts, |candidates| placement::place(spec, candidates))
        .map_err(|problem| problem.at("host", named, "a host that can take the VM"))?;
    let size_bytes = hosts
        .iter()
        .find(|host| host.value.id == chosen)
        .and_then(|host| host.pool(&spec.pool))
        .map_or(0, |pool| pool.size_bytes);
    reach::fits_pool(spec, size_bytes / MIB, &format!("the size of pool {}", spec.pool))?;
    Ok(chosen)
}

fn default_pool() -> Name {
    "default".parse().expect("a good name")
}

fn online(cluster: &Cluster) -> Vec<Arc<Row<Host>>> {
    let hosts = cluster.records.list::<Host>().into_iter();
    hosts.filter(|host| host.state == HostState::Online && host.inventory.is_some()).collect()
}

/// The image that a wish names, if a VM of this segment may lie on it.
pub(super) fn usable_image(
    cluster: &Cluster,
    wish: &CreateVm,
    segment: &Row<Segment>,
) -> Result<Arc<Row<Image>>, Problem> {
    let image = cluster.records.find_image_for(&segment.value.id, &wish.image)?;
    if image.segment.as_ref().is_some_and(|owner| *owner != segment.value.id) {
        return Err(Problem::not_found("image", &wish.image));
    }
    if image.state != ImageState::Ready {
        let message = format!("image {} is not whole yet: parts of it have still to be uploaded", image.name);
        return Err(Problem::new(ProblemCode::WrongState, message).at("image", &wish.image, "a ready image"));
    }
    match image::busy(cluster, &image) {
        Some(problem) => Err(problem),
        None => Ok(image),
    }
}

fn disk_mib(wish: &CreateVm, image: &Image) -> Result<u64, Problem> {
    let image_bytes =
        image.part(PartRole::Disk).map_or(0, |part| part.virtual_size_bytes.unwrap_or(part.size_bytes));
    let least_mib = image_bytes.div_ceil(MIB);
    match wish.disk_mib {
        Some(0) => Err(Problem::field("disk_mib", 0, "at least 1")),
        Some(wanted) if wanted < least_mib => Err(Problem::field(
            "disk_mib",
            wanted,
            format!("at least {least_mib}, the size of image {}", image.name),
        )),
        Some(wanted) => Ok(wanted),
        None => Ok(least_mib.max(DISK_MIB_DEFAULT_MIN)),
    }
}

/// The newest machine type that every host offers, so that the VM can go to each of them.
fn machine_type(wish: &CreateVm, hosts: &[Arc<Row<Host>>]) -> Result<String, Problem> {
    if let Some(wanted) = &wish.machine_type {
        return Ok(wanted.clone());
    }
    let offered = |host: &Row<Host>| -> BTreeSet<String> {
        let types = host.inventory.iter().flat_map(|inventory| inventory.qemu.machine_types.iter());
        types.filter(|name| name.starts_with(MACHINE_FAMILY)).cloned().collect()
    };
    common(hosts, offered)
        .into_iter()
        .max_by_key(|name| version_of(name))
        .ok_or_else(|| no_common("machine_type", hosts, &format!("of the {MACHINE_FAMILY} family")))
}

fn version_of(machine_type: &str) -> Vec<u32> {
    let version = machine_type.strip_prefix(MACHINE_FAMILY).unwrap_or_default();
    version.split('.').map_while(|part| part.parse().ok()).collect()
}

fn cpu_model(wish: &CreateVm, hosts: &[Arc<Row<Host>>]) -> Result<String, Problem> {
    if let Some(wanted) = &wish.cpu_model {
        return Ok(wanted.clone());
    }
    let offered = |host: &Row<Host>| -> BTreeSet<String> {
        host.inventory.iter().flat_map(|inventory| inventory.qemu.cpu_models.iter()).cloned().collect()
    };
    let common = common(hosts, offered);
    let preferred = CPU_MODELS.iter().find(|model| common.contains(**model)).map(|model| (*model).to_owned());
    preferred.or_else(|| common.first().cloned()).ok_or_else(|| no_common("cpu_model", hosts, "at all"))
}

fn common(hosts: &[Arc<Row<Host>>], offered: impl Fn(&Row<Host>) -> BTreeSet<String>) -> BTreeSet<String> {
    let mut sets = hosts.iter().map(|host| offered(host));
    let first = sets.next().unwrap_or_default();
    sets.fold(first, |common, next| common.intersection(&next).cloned().collect())
}

fn no_common(field: &str, hosts: &[Arc<Row<Host>>], which: &str) -> Problem {
    if hosts.is_empty() {
        return Problem::new(ProblemCode::NoPlacement, "no host is online: join one with 'berth agent join'");
    }
    let message = format!("the hosts have no {field} {which} in common: name one");
    Problem::new(ProblemCode::NoPlacement, message).at(field, "", "one that the wanted host offers")
}

fn nics(cluster: &Cluster, wish: &CreateVm, number: u32) -> Result<Vec<Nic>, Problem> {
    let one = [NewNic::default()];
    let wanted = wish.nics.as_deref().unwrap_or(&one);
    if wanted.len() > NICS_MAX {
        return Err(Problem::field("nics", wanted.len(), format!("at most {NICS_MAX} interfaces")));
    }
    let vms = cluster.records.list::<Vm>();
    let known = || vms.iter().flat_map(|vm| vm.spec.nics.iter().map(move |nic| (vm, nic)));
    let mut macs: BTreeSet<String> = known().map(|(_, nic)| nic.mac.clone()).collect();
    let mut addresses: BTreeSet<Ipv4Addr> = known().filter_map(|(_, nic)| plain_address(nic)).collect();
    let mut nics = Vec::new();
    for (index, new) in wanted.iter().enumerate() {
        let mac = mac(new, number, index, &macs)?;
        let (address, gateway) = address(cluster, new, index, &addresses)?;
        let nic = Nic { mac, address, gateway, forwards: new.forwards.clone() };
        macs.insert(nic.mac.clone());
        addresses.extend(plain_address(&nic));
        nics.push(nic);
    }
    Ok(nics)
}

fn plain_address(nic: &Nic) -> Option<Ipv4Addr> {
    nic.address.as_ref()?.split('/').next()?.parse().ok()
}

fn mac(new: &NewNic, number: u32, index: usize, taken: &BTreeSet<String>) -> Result<String, Problem> {
    let Some(wanted) = &new.mac else {
        // Three bytes hold two million VMs with eight interfaces each. One that somebody chose by hand is passed over.
        let first = u64::from(number) * NICS_MAX as u64 + index as u64;
        let mut free = (first..first + (1 << 24)).map(own_mac).filter(|mac| !taken.contains(mac));
        return free.next().ok_or_else(|| Problem::field("nics", "mac", "a free address; all are taken"));
    };
    let mac = wanted.to_ascii_lowercase();
    if taken.contains(&mac) {
        return Err(Problem::field(format!("nics.{index}.mac"), mac, "an address that no other VM has"));
    }
    Ok(mac)
}

fn own_mac(number: u64) -> String {
    let [.., a, b, c] = number.to_be_bytes();
    format!("52:54:00:{a:02x}:{b:02x}:{c:02x}")
}

fn address(
    cluster: &Cluster,
    new: &NewNic,
    index: usize,
    taken: &BTreeSet<Ipv4Addr>,
) -> Result<(Option<String>, Option<String>), Problem> {
    let range = cluster.settings.addresses;
    match new.address.as_deref() {
        Some(DHCP) => Ok((None, None)),
        Some(wanted) => {
            let plain: Option<Ipv4Addr> = wanted.split('/').next().and_then(|text| text.parse().ok());
            if plain.is_some_and(|plain| taken.contains(&plain)) {
                let field = format!("nics.{index}.address");
                return Err(Problem::field(field, wanted, "an address that no other VM has"));
            }
            let gateway = range.filter(|range| plain.is_some_and(|plain| range.contains(plain)));
            Ok((Some(wanted.to_owned()), gateway.map(|range| range.gateway().to_string())))
        }
        None => match range {
            Some(range) => Ok((Some(range.next_free(taken)?), Some(range.gateway().to_string()))),
            None => Ok((None, None)),
        },
    }
}

/// User data that cloud-init would refuse is refused here, where somebody reads the answer.
#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machine_types_are_compared_by_number() {
        let mut types = ["pc-q35-7.2", "pc-q35-10.0", "pc-q35-9.2", "pc-q35-2.12"];
        types.sort_by_key(|name| version_of(name));
        assert_eq!(types, ["pc-q35-2.12", "pc-q35-7.2", "pc-q35-9.2", "pc-q35-10.0"]);
    }

    #[test]
    fn a_mac_is_made_of_the_vms_number_unless_it_is_taken() {
        let mut taken = BTreeSet::new();
        let first = mac(&NewNic::default(), 1, 0, &taken).expect("a mac");
        assert_eq!(first, "52:54:00:00:00:08");
        taken.insert(first);
        assert_eq!(mac(&NewNic::default(), 1, 0, &taken).expect("a mac"), "52:54:00:00:00:09");
    }
}
