#!/bin/sh
# Sends what its API description allows, and what it does not, to a manager, and fails on any answer that is a fault of
# the manager's (5xx). The manager must be one that may be broken: requests are random and made as an administrator.
#
# schemathesis.sh URL CA_FILE SECONDS, with the administrator's token in BERTH_TOKEN. Exits with 77 if Python is missing.
set -eu

# 4.32 runs on Python 3.10 and later: Debian 12 has 3.11.
version=4.32.5
url=$1 ca=$2 seconds=$3
cd "$(dirname "$0")/.."
venv=$(realpath --canonicalize-missing "${CARGO_TARGET_DIR:-target}")/schemathesis/$version

if ! python3 -c 'import venv, ensurepip' 2> /dev/null; then
    echo "python3 with venv and pip is missing: scripts/deps.sh installs it" >&2
    exit 77
fi
if ! [ -e "$venv/ready" ]; then
    rm -rf "$venv"
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check "schemathesis==$version"
    touch "$venv/ready"
fi

# It keeps notes in the folder that it runs in.
cd "$venv"

# The wait for an operation, the longest of all answers, takes a minute; each of the routes gets its share of the time.
exec "$venv/bin/schemathesis" --no-color run "$url/v1/openapi.json" \
    --tls-verify "$ca" --header "Authorization: Bearer $BERTH_TOKEN" \
    --checks not_a_server_error --phases examples,coverage,fuzzing \
    --max-time "$seconds" --request-timeout 70 --max-failures 20 --warnings off \
    --suppress-health-check all --generation-database none --output-truncate true
