# shellcheck shell=bash source=SCRIPTDIR/lib.sh
# Boots a Debian system made by lib.sh, under user-mode Linux or qemu, hands it an archive, and passes on what it tells.
#
# Nothing in a system outlives its run: its disk is never written to, it shares no network with this machine, and
# what it is given is an archive in place of a second disk, what it tells comes over a terminal line of its own.
# User-mode Linux is a program of an ordinary user: up in half a minute, Python five to ten times slower than here;
# no Landlock, one processor. qemu runs the suite's stock kernel: with KVM as fast as here, without (TCG) up in
# several minutes and Python fifty times slower.

. "${BASH_SOURCE[0]%/*}/lib.sh"

# What a system has besides what its machine needs.
system_packages=(systemd systemd-sysv dbus dbus-user-session libpam-systemd udev kmod iproute2 procps
  openssh-server python3 rabbitmq-server python3-pika)

# Devices are there without it, and looking at each takes an emulated system minutes.
without_udev=(systemd.mask=systemd-udevd.service systemd.mask=systemd-udev-trigger.service
  systemd.mask=serial-getty@ttyS0.service)

# The ordinary user that runs user-mode Linux.
nobody=65533

bootable_root() { # SUITE uml|qemu
  case $2 in
    uml) debian_root "$1" "${system_packages[@]}" user-mode-linux ;;
    qemu) debian_root "$1" "${system_packages[@]}" linux-image-amd64 apparmor ;;
  esac
}

# Prints the disk of a root, made once and again when what prepares it has changed.
disk_of() { # ROOT
  local root=$1 prepare disk lock
  prepare=${BASH_SOURCE[0]%/*}/prepare
  disk=$cache/disks/${root##*/}-$(sha256sum <"$prepare" | cut -c1-8).ext4
  exec {lock}>>"$root.lock"
  flock "$lock"
  if [[ ! -e $disk ]]; then
    echo "making the disk $disk" >&2
    mkdir -p "$cache/disks"
    rm -rf "$disk.root" "$cache/disks/${root##*/}"-*.ext4
    cp -a --reflink=auto "$root" "$disk.root"
    unshare --mount --pid --fork --kill-child --mount-proc="$disk.root/proc" \
      chroot "$disk.root" /bin/sh -s <"$prepare" >&2 || die "the system of $root could not be prepared"
    truncate -s 4G "$disk.part"
    # Without what the oldest of these kernels does not know.
    mke2fs -q -F -t ext4 -O ^metadata_csum_seed,^orphan_file -d "$disk.root" "$disk.part"
    rm -rf "$disk.root"
    chmod 644 "$disk.part"
    mv "$disk.part" "$disk"
  fi
  exec {lock}>&-
  echo "$disk"
}

# What the system tells is our standard output, what its kernel says goes to LOG. Ends when the system powers off, or
# at a limit that only a system meets which hangs.
boot_uml() { # ROOT ARCHIVE WORK LOG LIMIT
  local root=$1 archive=$2 work=$3 log=$4 limit=$5 disk memory=/mnt
  disk=$(disk_of "$root")
  chmod 755 "$cache" "$cache/disks" "$work"
  # Its memory is a file that it runs from; a container's /dev/shm is neither large enough nor meant for that.
  if (($(df --output=avail -m /dev/shm | tail -n 1) > 2600)) && ! findmnt -no OPTIONS /dev/shm | grep -q noexec; then
    memory=/dev/shm
  fi
  install -d -o "$nobody" -g "$nobody" "$work/uml"
  cc -shared -fPIC -O1 -o "${archive%/*}/uml.so" "${BASH_SOURCE[0]%/*}/uml.c"
  # In a chroot: the program wants the C library of its suite. It ends with unshare, which only SIGKILL ends before.
  # Its kernel's panic ends it by a signal, which a first process would ignore: the shell stays that.
  # shellcheck disable=SC2016 # for the inner shell
  timeout --foreground --kill-after 5 "$limit" \
    unshare --mount --pid --fork --kill-child --mount-proc="$root/proc" bash -c '
    set -e
    root=$1 nobody=$2
    mount --rbind /dev "$root/dev"
    mount --bind "$3" "$root/mnt"
    mount --bind "$4" "$root/media"
    mount --bind "$5" "$root/srv"
    shift 5
    chroot "$root" setpriv --reuid "$nobody" --regid "$nobody" --clear-groups --pdeathsig KILL \
      env -i HOME=/mnt LD_PRELOAD=/srv/uml.so "$@" || exit $?' - \
    "$root" "$nobody" "$work/uml" "$cache/disks" "${archive%/*}" \
    "TMPDIR=$memory" ${SP_TEST_RUN:+"SP_TEST_RUN=$SP_TEST_RUN"} \
    /usr/bin/linux.uml mem=2500M root=/dev/ubda rw "ubd0=/mnt/changes,/media/${disk##*/}" "ubd1r=/srv/${archive##*/}" \
    con=null con0=null,fd:2 con1=null,fd:1 ssl=null "${without_udev[@]}" \
    sandpiper.payload=/dev/ubdb sandpiper.out=/dev/tty1 </dev/null 2>"$log"
}

# KVM counts when a kernel comes up with it: a device file can be there and do nothing.
kvm_works() { # ROOT LOG
  [[ -w /dev/kvm ]] || return 1
  need qemu-system-x86_64 qemu-system-x86 seabios
  # One that does nothing can abort qemu, which the shell would tell.
  { timeout 20 qemu-system-x86_64 -machine q35 -accel kvm -cpu host -m 512 -nodefaults -display none -no-reboot \
    -kernel "$(compgen -G "$1/boot/vmlinuz-*")" -initrd "$(compgen -G "$1/boot/initrd.img-*")" \
    -append "console=ttyS0 rdinit=/bin/true panic=-1" -serial stdio </dev/null >"$2" 2>&1 || true; } 2>/dev/null
  grep -q 'Run /bin/true as init process' "$2"
}

boot_qemu() { # ROOT ARCHIVE WORK LOG LIMIT
  local root=$1 archive=$2 work=$3 log=$4 limit=$5 disk machine
  need qemu-system-x86_64 qemu-system-x86 seabios
  disk=$(disk_of "$root")
  if kvm_works "$root" "$work/kvm"; then machine=(-accel kvm -cpu host)
  else machine=(-accel "tcg,thread=multi,tb-size=1024" -cpu max); fi
  # The changes to the disk are thrown away.
  TMPDIR=$work timeout --foreground --kill-after 5 "$limit" \
    qemu-system-x86_64 -machine q35 "${machine[@]}" -smp 2 -m 3072 -nodefaults -display none -no-reboot \
    -kernel "$(compgen -G "$root/boot/vmlinuz-*")" -initrd "$(compgen -G "$root/boot/initrd.img-*")" \
    -append "root=/dev/vda rw console=ttyS0 sandpiper.payload=/dev/vdb sandpiper.out=/dev/ttyS1 ${without_udev[*]}" \
    -drive "file=$disk,if=virtio,format=raw,snapshot=on,cache=unsafe" \
    -drive "file=$archive,if=virtio,format=raw,readonly=on" \
    -device virtio-rng-pci -serial "file:$log" -serial stdio </dev/null
}
