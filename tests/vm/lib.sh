# shellcheck shell=bash
# Debian systems beside this one, in one folder outside the checkout: sourced by whatever tests in them. Whoever
# sources this has `set -e` on, and is root where a system is made.
#
#   cache         where all of it lies: $SANDPIPER_VM, else /var/tmp/sandpiper-vm, of your own. Delete it to begin anew.
#   debian_root   a root file system of any suite with the packages that are named, made once
#   need          a package of this machine

cache=${SANDPIPER_VM:-/var/tmp/sandpiper-vm}

die() { echo "${0##*/}: $*" >&2; exit 1; }

# Programs are taken from there and run as root: whoever may put some there would be root.
mkdir -p "$cache"
[[ -O $cache && ! -L $cache && ! $(stat -c %A "$cache") =~ ^.....w|^........w ]] ||
  die "$cache is a link, or somebody else's, or others can write to it; name a directory of your own: SANDPIPER_VM"

# Installs Debian packages of which none has a service.
need() { # COMMAND PACKAGE...
  local command=$1
  shift
  ! command -v "$command" >/dev/null || return 0
  if ((EUID != 0)) || ! command -v apt-get >/dev/null; then
    die "$command is missing here; on Debian, as root: apt-get install --no-install-recommends $*"
  fi
  local install=(apt-get -o DPkg::Lock::Timeout=300 install -qy --no-install-recommends "$@")
  echo "installing $*" >&2
  { DEBIAN_FRONTEND=noninteractive "${install[@]}" ||
    { apt-get -o DPkg::Lock::Timeout=300 update -q && DEBIAN_FRONTEND=noninteractive "${install[@]}"; }; } >&2 </dev/null ||
    die "$* could not be installed"
}

# The mirror that this machine's own apt is configured with, so that systems come from where the machine's packages do.
debian_mirror() {
  local found
  if [[ -n ${SANDPIPER_DEBIAN_MIRROR:-} ]]; then echo "$SANDPIPER_DEBIAN_MIRROR"; return; fi
  command -v apt-get >/dev/null || die "no apt here to ask for a mirror of Debian; SANDPIPER_DEBIAN_MIRROR names one"
  found=$(mirror_of_apt)
  # Who published it is known from the lists, which a fresh container has not fetched yet.
  [[ -n $found ]] || { apt-get -o DPkg::Lock::Timeout=300 update -q >&2 && found=$(mirror_of_apt); }
  [[ -n $found ]] || die "apt here is not configured with Debian; SANDPIPER_DEBIAN_MIRROR names a mirror of it"
  echo "$found"
}

mirror_of_apt() {
  # shellcheck disable=SC2016 # apt's own variable
  apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' 'Label: Debian' | awk 'NR == 1'
}

# Prints the folder of a root file system: the smallest that apt works in, and these packages. Made once; other
# packages are another folder. Nothing in it is started.
debian_root() { # SUITE [PACKAGE...]
  local suite=$1 packages root mirror lock script=''
  shift
  packages=$(printf '%s\n' "$@" | sort -u | paste -sd,)
  root=$cache/roots/$suite-$(sha256sum <<<"$packages" | cut -c1-8)
  mkdir -p "$cache/roots" "$cache/packages"
  exec {lock}>"$root.lock"
  flock "$lock"
  if [[ ! -d $root ]]; then
    ((EUID == 0)) || die "only root can make a Debian $suite"
    need debootstrap debootstrap
    mirror=$(debian_mirror)
    # Suites are named years before they exist, yet not in time for every debootstrap; all of today's are made alike.
    [[ -e /usr/share/debootstrap/scripts/$suite ]] || script=/usr/share/debootstrap/scripts/sid
    echo "making a Debian $suite in $root" >&2
    rm -rf "$root.part"
    # In namespaces of its own, so that neither a mount nor a process of an installation stays.
    unshare --mount --pid --fork --kill-child \
      debootstrap --variant=minbase --cache-dir="$cache/packages" ${packages:+"--include=$packages"} \
      "$suite" "$root.part" "$mirror" ${script:+"$script"} >"$root.log" 2>&1 </dev/null ||
      { tail -n 20 "$root.log" >&2; die "Debian $suite could not be made; see $root.log"; }
    rm -rf "$root.part"/var/cache/apt/archives/*.deb
    echo "$packages" >"$root.packages"
    mv "$root.part" "$root"
  fi
  exec {lock}>&-
  echo "$root"
}
