//! Downloads the distribution's packages as any user may, and unpacks them.
//!
//! Names differ between Debian and Ubuntu, and the kernel's changes with every update, so they are asked of apt.
//! Where this machine's package lists are missing or too old, private ones are fetched into the cache: neither
//! the system's lists nor its packages are touched.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use super::output;

/// Packages that depend on the newest kernel for virtual machines: Debian's name, Ubuntu's name.
const KERNELS: [&str; 2] = ["linux-image-cloud-amd64", "linux-image-virtual"];

/// Packages besides the kernel whose dependencies are not needed.
const PROGRAMS: [&str; 1] = ["busybox-static"];

/// The package whose libraries are needed too.
const AGENT: &str = "qemu-guest-agent";

/// Debian 12's name.
const DEBIAN_12: &str = "bookworm";

/// Unpacked packages.
#[derive(Debug)]
pub struct Unpacked {
    /// Directory that looks like the root of a system that has them installed.
    pub root: PathBuf,
    /// Name and version of each.
    pub packages: BTreeMap<String, String>,
}

/// Which lists apt works with.
#[derive(Debug, Clone)]
pub struct Apt {
    options: Vec<String>,
}

/// Downloads and unpacks all that the image is made of.
pub fn fetch(cache: &Path) -> Result<Unpacked> {
    let system = Apt { options: vec!["APT::Sandbox::User=root".into()] };
    match download(&system, cache) {
        Ok(unpacked) => Ok(unpacked),
        Err(why) => {
            eprintln!("this machine's package lists won't do ({why:#}), fetching private ones");
            let private = Apt::private(cache)?;
            download(&private, cache).context("the test guest's packages can't be downloaded")
        }
    }
}

fn download(apt: &Apt, cache: &Path) -> Result<Unpacked> {
    let mut names = apt.kernel()?;
    names.extend(PROGRAMS.map(str::to_owned));
    names.extend(apt.with_dependencies(AGENT)?);
    let (debs, root) = (cache.join("packages"), cache.join("root"));
    for directory in [&debs, &root] {
        if directory.exists() {
            fs::remove_dir_all(directory)?;
        }
        fs::create_dir_all(directory)?;
    }
    eprintln!("downloading {} packages", names.len());
    output(apt.command("apt-get").arg("download").args(&names).current_dir(&debs))?;
    let mut packages = BTreeMap::new();
    for deb in fs::read_dir(&debs)? {
        let deb = deb?.path();
        let fields = output(Command::new("dpkg-deb").arg("-W").arg(&deb))?;
        let fields = String::from_utf8_lossy(&fields);
        let (name, version) = fields.trim().split_once('\t').context("a package without a version")?;
        packages.insert(name.to_owned(), version.to_owned());
        output(Command::new("dpkg-deb").arg("-x").arg(&deb).arg(&root))?;
    }
    fs::remove_dir_all(&debs)?;
    Ok(Unpacked { root, packages })
}

impl Apt {
    /// Fresh lists from this machine's sources, kept in the cache.
    fn private(cache: &Path) -> Result<Self> {
        Self::updated(cache, Vec::new())
    }

    /// Fresh lists of the backports to this machine's release, from where its packages come; none, if it is not one that
    /// has backports there.
    pub fn of_backports(cache: &Path) -> Result<Option<Self>> {
        let asked =
            ["indextargets", "--format", "$(REPO_URI) $(CODENAME) $(COMPONENT)", "Created-By: Packages"];
        let targets = output(Command::new("apt-get").args(asked))?;
        let targets = String::from_utf8_lossy(&targets).into_owned();
        let Some(place) = targets.lines().find_map(main_of_debian_12) else { return Ok(None) };
        let list = cache.join("backports.list");
        fs::write(&list, format!("deb {place} {DEBIAN_12}-backports main\n"))?;
        let options = vec![
            format!("Dir::Etc::sourcelist={}", list.display()),
            "Dir::Etc::sourceparts=/dev/null".to_owned(),
        ];
        Ok(Some(Self::updated(cache, options)?))
    }

    fn updated(cache: &Path, more: Vec<String>) -> Result<Self> {
        let (state, store) = (cache.join("apt/state"), cache.join("apt/cache"));
        fs::create_dir_all(state.join("lists/partial"))?;
        fs::create_dir_all(store.join("archives/partial"))?;
        let status = Path::new("/var/lib/dpkg/status");
        let mut options = vec![
            "APT::Sandbox::User=root".into(),
            format!("Dir::State={}", state.display()),
            format!("Dir::State::status={}", status.display()),
            format!("Dir::Cache={}", store.display()),
        ];
        options.extend(more);
        let apt = Self { options };
        output(apt.command("apt-get").arg("update"))?;
        Ok(apt)
    }

    /// A program of apt's, told of the lists.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("LC_ALL", "C.UTF-8");
        for option in &self.options {
            command.args(["-o", option]);
        }
        command
    }

    /// The kernel's package and, where they are apart, its modules'.
    fn kernel(&self) -> Result<Vec<String>> {
        let Some(image) = KERNELS.iter().find_map(|name| {
            self.depends(name).ok()?.into_iter().find(|found| found.starts_with("linux-image-"))
        }) else {
            bail!("apt knows none of {}", KERNELS.join(", "));
        };
        let mut names = vec![image.clone()];
        names.extend(self.depends(&image)?.into_iter().filter(|name| name.starts_with("linux-modules-")));
        Ok(names)
    }

    fn depends(&self, package: &str) -> Result<Vec<String>> {
        let text = output(self.command("apt-cache").args(["show", "--no-all-versions", package]))?;
        let text = String::from_utf8_lossy(&text);
        let field = text.lines().find_map(|line| line.strip_prefix("Depends:")).unwrap_or_default();
        Ok(field
            .split([',', '|'])
            .filter_map(|part| part.split_whitespace().next())
            .map(str::to_owned)
            .collect())
    }

    /// The package and everything that it needs at run time; what only installing needs is left out.
    fn with_dependencies(&self, package: &str) -> Result<BTreeSet<String>> {
        let without =
            ["pre-depends", "recommends", "suggests", "conflicts", "breaks", "replaces", "enhances"];
        let text = output(
            self.command("apt-cache")
                .args(["depends", "--recurse"])
                .args(without.map(|kind| format!("--no-{kind}")))
                .arg(package),
        )?;
        let names = package_names(&String::from_utf8_lossy(&text));
        ensure!(names.contains(package), "apt does not know {package}");
        Ok(names)
    }
}

/// Where the main packages of Debian 12 come from, if a line of apt's says so.
fn main_of_debian_12(line: &str) -> Option<&str> {
    let (place, release) = line.split_once(' ')?;
    (release.strip_prefix(DEBIAN_12)? == " main").then_some(place)
}

/// Names that stand at the beginning of a line; others are dependencies, which are listed again as packages, and
/// names in angle brackets, which no package has.
fn package_names(text: &str) -> BTreeSet<String> {
    text.lines()
        .filter(|line| line.starts_with(|first: char| first.is_ascii_alphanumeric()))
        .filter(|line| !line.contains(':'))
        .map(|line| line.trim().to_owned())
        .collect()
}

impl Unpacked {
    /// The kernel's release name and file.
    pub fn kernel(&self) -> Result<(String, PathBuf)> {
        for entry in fs::read_dir(self.root.join("boot")).context("the kernel's package has no /boot")? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if let Some(release) = name.strip_prefix("vmlinuz-") {
                return Ok((release.to_owned(), path));
            }
        }
        bail!("the kernel's package has no kernel")
    }

    /// A file by its path in the installed system, wherever a merged or unmerged `/usr` puts it.
    pub fn find(&self, path: &str) -> Option<PathBuf> {
        let path = path.trim_start_matches('/');
        let other = path.strip_prefix("usr/").map_or_else(|| format!("usr/{path}"), str::to_owned);
        [path, &other].into_iter().map(|path| self.root.join(path)).find(|path| path.exists())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn package_names_are_told_from_dependencies_and_virtual_names() {
        let text =
            "qemu-guest-agent\n  Depends: libc6\n |Depends: <awk>\n    mawk\nlibc6\n<awk>\nlibc6:i386\n";
        let names: Vec<String> = package_names(text).into_iter().collect();
        assert_eq!(names, ["libc6", "qemu-guest-agent"]);
    }

    #[test]
    fn only_debian_12_is_asked_for_backports() {
        let found = main_of_debian_12("http://mirror/debian/ bookworm main");
        assert_eq!(found, Some("http://mirror/debian/"));
        for other in
            ["http://mirror/debian/ bookworm-updates main", "http://mirror/ubuntu noble main", "", "x"]
        {
            assert_eq!(main_of_debian_12(other), None, "{other}");
        }
    }

    #[test]
    fn a_file_is_found_with_and_without_usr() {
        let root = tempfile::tempdir().expect("a temporary directory");
        fs::create_dir_all(root.path().join("usr/bin")).unwrap();
        fs::write(root.path().join("usr/bin/busybox"), "").unwrap();
        let unpacked = Unpacked { root: root.path().to_owned(), packages: BTreeMap::new() };
        let expected = Some(root.path().join("usr/bin/busybox"));
        assert_eq!(unpacked.find("/bin/busybox"), expected);
        assert_eq!(unpacked.find("/usr/bin/busybox"), expected);
        assert_eq!(unpacked.find("/bin/sh"), None);
    }
}
