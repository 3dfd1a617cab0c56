# A snapshot that is cut off at any byte, or of which any byte is another one,
# fails the job on both nodes and does no harm to either. Every offset is tried,
# with one job each.

source tests/support/slot_migration.tcl

set ::slots {5 6}

# A few keys of different kinds in two slots: a snapshot below 1 KB.
proc fill_small {n} {
    set r [Rn $n]
    $r set [key_in 5 s] value
    $r set [key_in 5 i] 12345 px 100000000
    $r rpush [key_in 5 l] a 1 b
    $r sadd [key_in 5 si] 1 2 70000
    $r sadd [key_in 5 sl] x y
    $r zadd [key_in 5 z] 1 a 2.5 b
    $r hset [key_in 6 h] f v g 2
    $r hset [key_in 6 hx] f v g w
    $r hpexpireat [key_in 6 hx] 4000000000000 fields 1 f
    $r xadd [key_in 6 x] 1-1 f v
    $r xgroup create [key_in 6 x] g 0
    $r xreadgroup group g c streams [key_in 6 x] >
    $r vadd [key_in 6 v] values 2 1 0.5 e q8
}

# The same with values that are not one blob each.
proc fill_small_tables {n} {
    set r [Rn $n]
    no_listpacks $n
    $r sadd [key_in 5 s] x y
    $r zadd [key_in 5 z] 1 a 2.5 b
    $r rpush [key_in 5 l] a [string repeat b 100]
    $r hset [key_in 6 h] f v g 2
    $r hset [key_in 6 hx] f v g w
    $r hpexpireat [key_in 6 hx] 4000000000000 fields 1 f
    $r xadd [key_in 6 x] 1-1 f v g w
    $r xadd [key_in 6 x] 2-1 f v
    $r xdel [key_in 6 x] 1-1
    listpacks $n
}

set ::options {
    hash-max-listpack-entries 512 set-max-intset-entries 512 set-max-listpack-entries 128
    zset-max-listpack-entries 128
}

proc listpacks {n} {
    R $n config set {*}$::options
}

proc no_listpacks {n} {
    foreach {option -} $::options {R $n config set $option 0}
}

# The bytes of the snapshot that a job of the slots would send now.
proc snapshot_bytes {{meanwhile ""}} {
    failpoint 0 source_before_cut pause
    set id [migrate 0 2 5 6]
    wait_job_state 0 $id streaming
    set bytes [job_field 0 $id bytes-done]
    uplevel 1 $meanwhile
    R 0 cluster cancel-slot-migrations id $id
    failpoint 0 source_before_cut off
    wait_job_state 2 $id cancelled
    return $bytes
}

# A job that is to fail; what is wrong with how it did, "" if nothing is.
proc wrong_with_failed_job {target digest} {
    set id [lindex [R 0 cluster migrate-slots slotsrange 5 6 node $target] 0]
    foreach n {0 2} {
        # Milliseconds: asking is as good as waiting.
        set until [expr {[clock seconds]+10}]
        while {![job_ended [dict get [set job [job $n $id]] state]]} {
            if {[clock seconds] > $until} {return "the job does not end at node $n: $job"}
        }
        if {[dict get $job state] ne "failed"} {return "the job at node $n is [dict get $job state]"}
        set error [dict get $job last-error]
        if {![regexp {offset \d+|slot \d+|index} $error]} {
            return "the error at node $n names neither offset nor slot nor index: '$error'"
        }
    }
    if {[R 0 debug digest] ne $digest} {return "the source's keys changed"}
    if {[R 0 get [key_in 5 served]] ne "yes"} {return "the source does not serve"}
    if {[R 2 dbsize] != 0} {return "the target has keys: [R 2 keys *]"}
    if {[slot_count 2] != 0} {return "the target has keys in the slots"}
    return ""
}

proc slot_count {n} {
    set count 0
    foreach slot $::slots {incr count [R $n cluster countkeysinslot $slot]}
    return $count
}

set ::sweep 0

# One job for each offset of the snapshot, each with this fail point of the source.
proc every_offset {failpoint} {
    # The bytes are the same each time: idle times would go on, counters of use
    # stay, if nobody counts.
    R 0 config set maxmemory-policy allkeys-lfu lfu-decay-time 0
    R 0 client no-touch on
    R 0 set [key_in 5 served] yes
    set digest [R 0 debug digest]
    set dump [slots_dump 0 $::slots]
    set target [node_id 2]
    # The snapshot tells offsets of the replication stream, which grows: of as many digits
    # throughout.
    assert {[snapshot_bytes {R 0 set [key_in 9 pad] [string repeat x 1100000]; R 0 del [key_in 9 pad]}]}
    set bytes [snapshot_bytes]
    assert_range $bytes 300 1200
    set c [connect 0]
    set wrong {}
    incr ::sweep
    for {set at 0} {$at < $bytes} {incr at} {
        # The log of ended jobs is full by then.
        if {$at == 150} {foreach n {0 2} {set before($n) [footprint $n]}}
        if {[catch {
            # Which bits of a byte: above its offset. One, some, or all.
            set bits [lindex {255 1 2 4 8 16 32 64 128 124} [expr {($at+$::sweep)%10}]]
            $c debug slotmig failpoint $failpoint fail [expr {$at + ($bits<<32)*($failpoint eq "source_flips_byte")}]
            set how [wrong_with_failed_job $target $digest]
        } error]} {
            set how $error
        }
        if {$how eq ""} continue
        foreach n {0 2} {if {![is_alive [node_pid $n]]} {append how " (node $n is dead)"}}
        lappend wrong "at $at of $bytes: $how"
        # A few of the same kind tell enough; after these there is no next job.
        if {[llength $wrong] == 20 || [regexp {does not end|is dead} $how]} break
    }
    catch {$c close}
    if {$wrong ne ""} {fail "$failpoint [join $wrong \n]"}

    failpoint 0 $failpoint off
    foreach n {0 2} {wait_no_leftovers $n $before($n)}
    assert_same_dump $dump [slots_dump 0 $::slots]
    # The offsets were those of the snapshot, the whole of which arrives.
    assert_equal $bytes [snapshot_bytes]
    R 0 client no-touch off
    R 0 config set maxmemory-policy noeviction lfu-decay-time 1
    R 0 set [key_in 5 served] still
    move_slots 0 2 5 6
    assert_equal still [R 2 get [key_in 5 served]]
    R 2 set [key_in 5 served] yes
    assert_equal $digest [R 2 debug digest]
}

start_cluster 3 0 {tags {external:skip cluster} overrides {cluster-slot-migration-timeout 0 cluster-slot-migration-snapshot fork}} {
    foreach fill {fill_small fill_small_tables} {
        foreach {failpoint what} {
            source_cuts_snapshot "is cut off at any byte"
            source_flips_byte    "has any byte changed"
        } {
            test "A snapshot that $what fails the job and nothing else ($fill)" {
                fresh
                $fill 0
                every_offset $failpoint
            }
        }
    }

    # The target then takes values apart before the section's sum is known.
    test "A snapshot that has any byte changed fails the job and nothing else, when the target converts the values" {
        fresh
        fill_small 0
        no_listpacks 2
        every_offset source_flips_byte
        listpacks 2
    }
}
