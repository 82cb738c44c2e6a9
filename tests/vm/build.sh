# shellcheck shell=bash source=SCRIPTDIR/lib.sh
# Builds what is carried into other systems against the oldest C library among them.
. "${BASH_SOURCE[0]%/*}/lib.sh"

# Prints a folder with the worker, its shim and the sandbox's test program, built in Debian 11 with this machine's
# own Rust. What crates they take is fetched out here: nothing in there needs a network.
build_for_all() { # PROJECT
  local project=$1 root program home=${CARGO_HOME:-$HOME/.cargo} target=$cache/target built=$cache/built
  root=$(debian_root bullseye gcc libc6-dev)
  mkdir -p "$target" "$built"
  (cd "$project" && cargo fetch --locked --quiet) || die "the crates of $project could not be fetched"
  # shellcheck disable=SC2016 # for the inner shell
  unshare --mount --pid --fork --kill-child --mount-proc="$root/proc" bash -c '
    set -e
    root=$1
    mount --rbind /dev "$root/dev"
    mount --bind "$2" "$root/srv" && mount -o remount,bind,ro "$root/srv"
    mount --bind "$3" "$root/opt" && mount -o remount,bind,ro "$root/opt"
    mount --bind "$4" "$root/media"
    mount --bind "$5" "$root/mnt"
    exec chroot "$root" env -i PATH=/opt/bin:/usr/bin:/bin HOME=/tmp CARGO_HOME=/media CARGO_TARGET_DIR=/mnt \
      CARGO_PROFILE_DEV_DEBUG=0 CARGO_PROFILE_DEV_STRIP=debuginfo sh -ec "
        cd /srv
        cargo build --offline --locked >&2
        cargo test --offline --locked --no-run --test sandbox --message-format json >/mnt/sandbox.json"' - \
    "$root" "$project" "$(rustc --print sysroot)" "$home" "$target" >&2 || die "the worker could not be built in $root"
  program=$(test_program <"$target/sandbox.json")
  cp "$target/debug/sandpiper" "$target/debug/libsandpiper_shim.so" "$built/"
  cp "$target${program#/mnt}" "$built/sandbox"
  echo "$built"
}

# The path of the sandbox's test program, of what cargo tells in JSON.
test_program() {
  sed -n 's|.*"kind":\["test"\].*"name":"sandbox".*"executable":"\([^"]*\)".*|\1|p'
}
