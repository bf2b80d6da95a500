#!/bin/sh
# Runs the nightly jobs under cron, which knows no exit codes and mails whatever is printed.
#   0 done, 3 the gate refused   nothing is printed
#   4 stopped part-way           tried again, as the same command resumes
#   1 failed, 2 wrong usage      the summary and the code are printed
set -u
jobs=${SIMSKIP_JOBS:-/etc/simskip/jobs.toml}
secrets=${SIMSKIP_ENV:-/etc/simskip/env}
log=${SIMSKIP_LOG:-/var/log/simskip/nightly.log}
tries=${SIMSKIP_TRIES:-4}
pause=${SIMSKIP_PAUSE:-600}

if [ -r "$secrets" ]; then
    set -a
    . "$secrets"
    set +a
fi

while :; do
    summary=$(simskip nightly "$jobs" --log-format json 2>>"$log")
    code=$?
    tries=$((tries - 1))
    [ "$code" -eq 4 ] && [ "$tries" -gt 0 ] || break
    sleep "$pause"
done

case $code in
0 | 3) ;;
*)
    printf '%s\n' "$summary" "simskip nightly ended with exit code $code; the log is $log"
    exit "$code"
    ;;
esac
