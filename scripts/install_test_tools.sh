#!/bin/sh
# Installs what tests use beyond Python: a browser for the planner's report, nftables and iproute2
# for pods in network namespaces. Needs root on Debian or Ubuntu; elsewhere it says what is missing.
# It never fails: a test whose tool is missing is skipped and says so.

missing=""
need() { # command, Debian's package
    command -v "$1" >/dev/null 2>&1 || missing="$missing $2"
}
PATH="$PATH:/usr/sbin:/sbin"
command -v chromium-browser >/dev/null 2>&1 || command -v google-chrome >/dev/null 2>&1 ||
    need chromium chromium
need nft nftables
need ip iproute2
need unshare util-linux

if [ -n "$missing" ]; then
    log=$(mktemp)
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
        echo "installing what tests use:$missing"
        export DEBIAN_FRONTEND=noninteractive
        # shellcheck disable=SC2086  # one word for each package
        if apt-get update -qq >"$log" 2>&1 &&
            apt-get install -y -qq --no-install-recommends $missing >>"$log" 2>&1; then
            missing=""
        else
            tail -n 3 "$log"
        fi
    fi
    rm -f "$log"
    [ -z "$missing" ] ||
        echo "some tests will be skipped: not installed:$missing (on Debian: apt-get install$missing)"
fi
command -v kubectl >/dev/null 2>&1 ||
    echo "some tests will be skipped: kubectl is not installed; Kubernetes manifests are not built"
