use clap::{CommandFactory, Parser};

use super::*;

fn parses(line: &str) -> bool {
    Cli::try_parse_from(line.split(' ')).is_ok()
}

#[test]
fn the_definition_has_no_contradictions() {
    Cli::command().debug_assert();
}

#[test]
fn lines_that_are_right_are_taken() {
    for line in [
        "berth whoami",
        "berth whoami --output json",
        "berth -o yaml vm list",
        "berth can-i snapshot.restore default/books",
        "berth host list --limit 5",
        "berth host join-token --expires 2h",
        "berth segment create accounting --dry-run",
        "berth image import --name probe --kernel k --initrd i",
        "berth vm create books --image probe --memory 256MiB --disk 1GiB",
        "berth vm create accounting/books --image probe --nic address=dhcp --nic mac=52:54:00:00:00:01",
        "berth vm create books --image probe --stopped",
        "berth vm create books --image probe --wait-for running --no-wait",
        "berth vm stop books --no-wait --output json",
        "berth vm delete books --force",
        "berth vm migrate books --to h2 --bandwidth 800mbit",
        "berth snapshot create books --name before-close --note done",
        "berth snapshot restore books",
        "berth snapshot restore books before-close --no-undo",
        "berth snapshot restore books before-close --clone copy --segment lab --paused",
        "berth snapshot restore books --clone copy --count 10 --cold",
        "berth snapshot restore books first --force",
        "berth snapshot verify books first --boot",
        "berth snapshot verify books --all",
        "berth snapshot verify --all --no-wait",
        "berth snapshot list books",
        "berth migration list --active",
        "berth operation wait op-0000000000000000 --timeout 5m",
        "berth operation list --kind vm.migrate --vm books",
        "berth token create ci --note builds --expires 30d",
        "berth token create --user ci --scope vm.view,vm.start --segment accounting --expires 7d",
        "berth segment create books --parent accounting --quota-vms 3 --quota-memory 64GiB",
        "berth segment update accounting --quota-vms none --quota-snapshot-size 100GiB --rename ledgers",
        "berth team create ledger --member ada --member bo --external-group corp:ledger",
        "berth team update ledger --add-member ada --remove-member bo --no-parent",
        "berth role create mover --copy-of viewer --action vm.migrate,vm.start --without host.view",
        "berth grant create --team ledger --role operator --segment accounting --until 2026-12-31T18:00Z",
        "berth grant create --user ada --role viewer --for 8h --note x",
        "berth grant request --role operator --segment accounting --for 4h --reason closing",
        "berth grant list --team ledger",
        "berth who-can vm.start accounting/books",
        "berth what-can",
        "berth what-can ada",
        "berth approval list --all",
        "berth approval approve apr-0000000000000000 --dry-run",
        "berth policy create no-moves --file -",
        "berth policy activate no-moves",
        "berth vm create books --image probe --class production",
        "berth vm update books --class production --dry-run",
        "berth audit list --actor eve --action vm.delete --resource default/books --decision deny --since 1h --limit 5",
        "berth audit verify",
        "berth audit verify audit.jsonl --key audit.pub --checkpoint seen.txt",
        "berth audit export --format cef --output-file a.cef --since 2026-11-22T00:00:00Z",
        "berth audit key",
        "berth completions bash",
        "berth up --hosts 3 --dir x --detach --link-mbit 1000 --pool-reserve 5",
        "berth down --dir x --purge",
        "berth manager run --config m.toml",
        "berth agent run --config a.toml",
        "berth agent join --manager m:8443 --token t --name h1 --pool local=/srv --bridge br0 --pool-reserve 20",
        "berth login --url https://m:8443 --ca ca.pem",
    ] {
        assert!(parses(line), "{line}");
    }
}

#[test]
fn lines_about_repositories_that_are_right_are_taken() {
    for line in [
        "berth snapshot export books before-close --repository offsite --dry-run",
        "berth snapshot import 1f3a5b7c --repository offsite --name books-2 --segment lab --cold",
        "berth snapshot import accounting/books/before-close --repository offsite --name books",
        "berth repository create offsite --url /srv/backup --password-file p --init",
        "berth repository create offsite --url sftp://berth@nas/srv --password-file - --key-file k --known-hosts-file h",
        "berth repository create offsite --url s3://bucket/x?endpoint=https://s3.example --password-file p --key-file k",
        "berth repository snapshots offsite",
        "berth repository delete offsite --dry-run",
    ] {
        assert!(parses(line), "{line}");
    }
}

#[test]
fn lines_that_are_wrong_are_refused() {
    for line in [
        "berth",
        "berth vm",
        "berth vm create books",
        "berth vm create Books --image probe",
        "berth vm create a/b/c --image probe",
        "berth vm create books --image probe --memory 256",
        "berth vm create books --image probe --memory -1GiB",
        "berth vm create books --image probe --memory 1KiB",
        "berth vm create books --image probe --vcpus -1",
        "berth vm create books --image probe --nic bridge=br0",
        "berth vm create books --image probe --no-nic --nic address=dhcp",
        "berth vm create books --image probe --stopped --wait-for ready",
        "berth snapshot verify",
        "berth snapshot verify books",
        "berth snapshot verify books first --all",
        "berth snapshot restore books --clone copy --force",
        "berth snapshot restore books --segment lab",
        "berth snapshot restore books --clone copy --no-undo",
        "berth snapshot restore books --clone copy --cold --paused",
        "berth vm migrate books --bandwidth 800",
        "berth vm list --limit 0",
        "berth vm show ../../etc/passwd",
        "berth can-i fly",
        "berth operation wait vm-0000000000000000",
        "berth operation list --kind vm.fly",
        "berth token delete user-0000000000000000",
        "berth vm list --output xml",
        "berth vm update books",
        "berth token create ci --user ada",
        "berth token create --scope fly",
        "berth segment create accounting --quota-vms many",
        "berth segment create accounting --quota-memory 64",
        "berth team create Ledger",
        "berth team create ledger --external-group corp",
        "berth team update ledger --parent x --no-parent",
        "berth grant create --role viewer",
        "berth grant create --role viewer --team a --user b",
        "berth grant create --role viewer --team a --until 2026-12-31T18:00Z --for 8h",
        "berth grant create --role viewer --team a --until tomorrow",
        "berth grant request --role viewer --for 4h",
        "berth grant delete apr-0000000000000000",
        "berth approval approve g-0000000000000000",
        "berth policy create x",
        "berth up --hosts 0",
        "berth up --hosts 9",
        "berth agent join --manager m:8443 --name h1",
        "berth agent join --manager m:8443 --name H1 --token t",
    ] {
        assert!(!parses(line), "{line}");
    }
}
