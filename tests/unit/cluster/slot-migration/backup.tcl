# Some slots out of a node, out of a file, and into a node: each is as it was, or the
# command says why not and nothing has changed.
#
# SPDX-License-Identifier: AGPL-3.0-only

source tests/support/slot_migration.tcl

# ---- redis-cli --rdb-slots and redis-check-rdb --extract-slots ----

proc cli_line {n slots file} {
    list src/redis-cli -p [node_port $n] {*}[expr {$::tls ? [list --tls --cert tests/tls/client.crt --key tests/tls/client.key \
        --cacert tests/tls/ca.crt] : {}}] --rdb-slots $slots $file
}

proc cli_backup {n slots file args} {
    run {*}[linsert [cli_line $n $slots $file] end-3 {*}$args]
}

proc backup {n slots file} {
    lassign [cli_backup $n $slots $file] status output
    if {$status ne 0} {fail "redis-cli --rdb-slots $slots: status $status: $output"}
    return $output
}

proc extract {args} {
    run src/redis-check-rdb --extract-slots {*}$args
}

# Node n starts with this file, as what it is ("ours" or "vanilla").
proc load_file {n file which} {
    file copy -force $file [dump_file $n]
    restart_as $n $which
    wait_for_cluster_state ok
}

# What `slots` have at node n, and nothing else is there.
proc assert_only {n slots dump} {
    assert_same_dump $dump [slots_dump $n $slots]
    assert_equal [dict size $dump] [R $n dbsize]
}

proc fill_here {n} {
    foreach slot {3 7 500} {fill_all_types $n $slot}
    fill_strings $n [slots_of {0 99}] 3000
    fill_strings $n [slots_of {1000 1100}] 500
}

# The replica of node 0, in a cluster of two shards.
proc mate {} {
    foreach n {2 3} {
        if {[lindex [R $n role] 2] == [node_port 0]} {return $n}
    }
    fail "node 0 has no replica"
}

proc wait_mate_agrees {slots} {
    set mate [mate]
    wait_for_condition 3000 10 {[R 0 dbsize] == [R $mate dbsize] && [R 0 debug digest] eq [R $mate debug digest]} else {
        fail "node 0 has [R 0 dbsize] keys, its replica [R $mate dbsize]"
    }
    foreach slot $slots {
        assert_equal [R 0 cluster countkeysinslot $slot] [R $mate cluster countkeysinslot $slot] "slot $slot"
    }
    foreach field {expires subexpiry} {
        wait_for_condition 1000 10 {[keyspace_field 0 $field] == [keyspace_field $mate $field]} else {
            fail "node 0: [keyspace 0], its replica: [keyspace $mate]"
        }
    }
}

set ::here [slots_of {0 99 500 500}]

# Nodes 0 and 1 are masters, the others are their replicas.
start_cluster 2 2 {tags {external:skip cluster} overrides {save {} appendonly no repl-diskless-sync-delay 0}} {
    wait_replicas_up
    fill_here 0
    set dump [slots_dump 0 $::here]
    set file [tmpfile backup.rdb]

    test "redis-cli --rdb-slots fetches just these slots as an RDB with an index" {
        set before [footprint 0]
        assert_match "Slots 0-99,500: * bytes written to $file" [backup 0 0-99,500 $file]
        assert_equal $::here [lsort -integer [dict keys [slots_in_file $file]]]
        assert_equal {} [glob -nocomplain $file.*]
        lassign [run src/redis-check-rdb $file] status output
        assert_equal 0 $status
        wait_no_leftovers 0 $before
        assert_equal $dump [slots_dump 0 $::here]
    }

    test "A replica gives what it has of its master's slots" {
        wait_mate_agrees {0 500}
        backup [mate] 0-99,500 $file.replica
        assert_equal [lmap {slot about} [slots_in_file $file] {list $slot [lrange $about 0 1]}] \
            [lmap {slot about} [slots_in_file $file.replica] {list $slot [lrange $about 0 1]}]
    }

    test "A backup to the standard output is the same file" {
        exec {*}[cli_line 0 0-99,500 -] >$file.out 2>/dev/null
        assert_equal [lmap {slot about} [slots_in_file $file] {lrange $about 0 1}] [lmap {slot about} [slots_in_file $file.out] {lrange $about 0 1}]
    }

    test "Slots without keys are a file without keys" {
        backup 0 200-300 $file.empty
        assert_equal {} [slots_in_file $file.empty]
    }

    test "What is asked for wrongly is refused with a sentence, and no file is made" {
        set none [tmpfile none.rdb]
        foreach {slots why} [list \
            16384 "'16384' names no slots: *as in 0-99,500*" \
            9-3 "'9-3' names no slots: *" \
            a "'a' names no slots: *" \
            "1,,2" "'1,,2' names no slots: *" \
            "" "'' names no slots: *" \
            "5,5" "The node refuses: ERR slot 5 is named twice" \
            "0-99,[expr {16384/2}]-[expr {16384/2+9}]" "The node refuses: ERR slot 8192 is served by node [node_id 1] (*: ask that one for it"] {
            lassign [cli_backup 0 $slots $none] status output
            assert_equal 1 $status
            assert_match $why $output
        }
        lassign [run src/redis-cli -p [node_port 0] --rdb-slots 5] status output
        assert_equal 1 $status
        assert_match "--rdb-slots needs slots and a file*" $output
        lassign [cli_backup 0 5 /no/such/directory/x] status output
        assert_equal 1 $status
        assert_match "*cannot be created: No such file or directory" $output
        assert_equal {} [glob -nocomplain $none*]
        lassign [cli_backup 0 5 /dev/null] status output
        assert_equal 1 $status
        assert_match "/dev/null is no regular file: *" $output
        assert_equal characterSpecial [file type /dev/null]
        R 1 cluster delslots 16000
        assert_error "*slot 16000 is served by no node*" {R 1 cluster backup-slots slotsrange 15990 16000}
        R 1 cluster addslots 16000
        wait_cluster_agrees
        foreach {args why} {
            {slotsrange 5} "*"
            {slots 5 6} "*syntax error*"
            {slotsrange 5 6 x} "*syntax error at 'x'*"
            {slotsrange 6 5} "*ends before it starts*"
        } {
            assert_error $why {R 0 cluster backup-slots {*}$args}
        }
        R 0 multi
        assert_error "*not allowed inside*" {R 0 cluster backup-slots slotsrange 5 6}
        R 0 discard
        assert_error "*not allowed from script*" {R 0 eval {return redis.call('cluster','backup-slots','slotsrange','5','6')} 0}
    }

    test "Each slot may be named alone" {
        backup 0 [join [slots_of {0 8191}] ,] $file.each
        assert_equal $::here [lmap slot [lsort -integer [dict keys [slots_in_file $file.each]]] {if {$slot ni $::here} continue; set slot}]
    }

    test "Interrupted, it leaves nothing behind" {
        R 0 set [key_in 0 large] [string repeat x 5000000]      ;# comes at once, the others do not
        with_config {0 {rdbcompression no rdb-key-save-delay 10000}} {
            set pid [exec {*}[cli_line 0 0-99,500 $file.int] >& /dev/null &]
            wait_for_condition 1000 10 {[glob -nocomplain $file.int.*.tmp] ne ""} else {fail "no temporary file"}
            exec kill -TERM $pid      ;# SIGINT may be ignored, from where the tests were started
            wait_for_condition 1000 10 {[glob -nocomplain $file.int*] eq ""} else {fail "[glob $file.int*] is left"}
        }
        R 0 del [key_in 0 large]
        wait_for_condition 1000 10 {[node_children 0] eq ""} else {fail "a child is left: [node_children 0]"}
    }

    test "A user needs the permission for administration" {
        R 0 acl setuser some on >secret ~* +@all -@dangerous
        lassign [cli_backup 0 5 $file.acl --user some --pass secret --no-auth-warning] status output
        assert_equal 1 $status
        assert_match "The node refuses: NOPERM*" $output
        R 0 acl setuser some +cluster|backup-slots
        lassign [cli_backup 0 5 $file.acl --user some --pass secret --no-auth-warning] status output
        assert_equal 0 $status
        R 0 acl deluser some
    }

    test "A backup waits for another child process, and is forgotten when its client goes" {
        wait_for_condition 1000 10 {[node_children 0] eq ""} else {fail "a child is left: [node_children 0]"}
        R 0 config set rdb-key-save-delay 100000
        R 0 bgsave
        set rd [send_command 0 cluster backup-slots slotsrange 0 10]
        set gone [send_command 0 cluster backup-slots slotsrange 0 10]
        $gone close
        wait_for_condition 100 10 {[status [Rn 0] blocked_clients] == 1} else {fail "[R 0 info clients]"}
        assert_equal 1 [status [Rn 0] rdb_bgsave_in_progress]
        R 0 config set rdb-key-save-delay 0
        exec kill -KILL [node_children 0]
        assert_match {$EOF:*} [gets [$rd channel]]
        $rd close
        wait_for_condition 1000 10 {[node_children 0] eq ""} else {fail "a child is left: [node_children 0]"}
    }

    test "A client that goes in the middle, or takes nothing, ends its backup" {
        set before [footprint 0]
        set timeout [lindex [R 0 config get repl-timeout] 1]
        R 0 config set repl-timeout 2
        R 0 config set rdbcompression no    ;# more than the sockets take
        R 0 set [key_in 3 large] [string repeat x 50000000]
        foreach leaves {1 0} {
            set rd [send_command 0 cluster backup-slots slotsrange 0 10]
            wait_for_log_messages 0 {"*Backup of 11 slots to *: started*"} 0 500 10
            wait_for_condition 100 10 {[node_children 0] ne ""} else {fail "no child"}
            if {$leaves} {$rd close}
            wait_for_condition 3000 10 {[node_children 0] eq ""} else {fail "a child is left: [node_children 0]"}
            if {!$leaves} {$rd close}
        }
        R 0 config set repl-timeout $timeout
        R 0 config set rdbcompression yes
        assert {[count_log_message 0 "the client is gone, or took nothing for repl-timeout"] >= 2}
        R 0 del [key_in 3 large]
        wait_no_leftovers 0 $before
    }

    test "A migration's snapshot and a backup do not disturb each other" {
        with_config {0 {cluster-slot-migration-snapshot fork}} {
            set id [R 0 cluster migrate-slots slotsrange 1000 1100 node [node_id 1] hold]
            backup 0 1000-1100 $file.moving
            wait_job_state 0 $id streaming
            R 0 cluster cancel-slot-migrations id $id
        }
    }

    test "A part of a file is extracted as an RDB of its own" {
        R 0 save
        backup 0 0-99,500 $file
        set out [tmpfile extract.rdb]
        lassign [extract 0-99,500,16000 [dump_file 0] $out] status output
        assert_equal 0 $status
        assert_match "101 of 102 slots have keys: * keys, * expires, * bytes." $output
        assert_equal $::here [lsort -integer [dict keys [slots_in_file $out]]]
        assert_equal 0 [lindex [run src/redis-check-rdb $out] 0]
        # Out of a backup, too.
        lassign [extract 7 $file $out.7] status output
        assert_equal 0 $status
        assert_equal 7 [dict keys [slots_in_file $out.7]]
        lassign [extract 9000 $file $out.none] status output
        assert_equal 0 $status
        assert_equal {} [slots_in_file $out.none]
    }

    test "An extract does not replace a file unless it is told to, and a file that is not good is refused" {
        set bytes [read_file $out]
        lassign [extract 7 $file $out] status output
        assert_equal 1 $status
        assert_match "$out exists: *--force to replace it" $output
        assert_equal $bytes [read_file $out]
        assert_equal 0 [lindex [extract 7 $file $out --force] 0]
        assert_equal 7 [dict keys [slots_in_file $out]]
        assert_equal 0 [lindex [extract 7 $out $out --force] 0]
        assert_equal 7 [dict keys [slots_in_file $out]]
        foreach args [list [list 7 $file] [list 7 $file $out.x $out.y] [list 7 $file $out.x --json]] {
            lassign [extract {*}$args] status output
            assert_equal 1 $status
            assert_match "Usage:*--extract-slots*" $output
        }
        foreach slots {"" 16384 3-1 x} {
            lassign [extract $slots $file $out.x] status output
            assert_equal 1 $status
            assert_match "'$slots' names no slots: *" $output
        }
        lassign [extract 7 /no/such/file $out.x] status output
        assert_equal 1 $status
        assert_match "/no/such/file cannot be opened: *" $output
        lassign [extract 7 $file /no/such/directory/x] status output
        assert_equal 1 $status
        # Damage in slot 7 matters for slot 7 only.
        set bytes [read_file $file]
        lassign [dict get [slots_in_file $file] 7] keys expires length offset
        set at [expr {$offset+$length-1}]
        write_file $out.bad [string replace $bytes $at $at "\xee"]
        lassign [extract 0-99 $out.bad $out.x] status output
        assert_equal 1 $status
        assert_match "$out.bad: Slot 7 at offset $offset is damaged: *" $output
        assert_equal {} [glob -nocomplain $out.x*]
        assert_equal 0 [lindex [extract 0-6,8-99 $out.bad $out.x] 0]
        file delete $out.x
        # Cut off.
        write_file $out.bad [string range $bytes 0 end-1]
        lassign [extract 7 $out.bad $out.x] status output
        assert_equal 1 $status
        assert_match "$out.bad: It does not end as an RDB does: *" $output
        assert_equal {} [glob -nocomplain $out.x*]
    }

    test "Damage at any byte of a file is never extracted as if it were good" {
        set seed 7
        expr {srand($seed)}
        set small [tmpfile small.rdb]
        R 0 set [key_in 42 only] value
        backup 0 42,500 $small
        set bytes [read_file $small]
        set wrong {}
        for {set i 0} {$i < ($::accurate ? 3000 : 300)} {incr i} {
            set at [expr {int(rand()*[string length $bytes])}]
            scan [string index $bytes $at] %c value
            write_file $small.bad [string replace $bytes $at $at [binary format c [expr {$value ^ (1 << int(rand()*8))}]]]
            file delete $small.x
            lassign [extract 42,500 $small.bad $small.x] status output
            if {$status eq 0} {
                # Outside of what was copied: what was copied is good.
                lassign [run src/redis-check-rdb $small.x] status output
                if {$status ne 0 || [dict keys [slots_in_file $small.x]] ne {42 500}} {lappend wrong "byte $at: $output"}
            } elseif {$status ni {1 2} || ![string match "$small.bad: *" $output] || [glob -nocomplain $small.x*] ne ""} {
                lappend wrong "byte $at: status $status: $output"
            }
        }
        if {$wrong ne ""} {fail [join [lrange $wrong 0 9] \n]}
    }
}

# A lone node, to load the files with.
start_cluster 1 0 {tags {external:skip cluster} overrides {save {} appendonly no}} {
    wait_for_cluster_state ok
    foreach name {backup extract} {set file_of($name) [tmpfile $name.rdb]}
    foreach which {vanilla ours} {
        test "Redis ($which) loads a backup and an extract, with all keys as they were" {
            foreach name {backup extract} {
                set all $file_of($name)
                if {$which eq "vanilla" && $name eq "backup"} {
                    fill_here 0
                    set dump [slots_dump 0 $::here]
                    R 0 save
                    backup 0 0-99,500 $all
                } elseif {$which eq "vanilla"} {
                    assert_equal 0 [lindex [extract 0-99,500 $saved $all --force] 0]
                }
                if {![info exists saved]} {
                    set saved [tmpfile saved.rdb]
                    file copy -force [dump_file 0] $saved
                }
                load_file 0 $all $which
                assert_only 0 $::here $dump
            }
        }
    }

    test "A file that Redis 8.0 saved has no index, and is not extracted from" {
        restart_as 0 vanilla
        R 0 save
        restart_as 0 ours
        set out [tmpfile extract.rdb]
        file delete $out
        file copy -force [dump_file 0] $out.in
        lassign [extract 7 $out.in $out] status output
        assert_equal 2 $status
        assert_match "$out.in: It has no index of slots. *" $output
        assert_equal {} [glob -nocomplain $out]
    }

    test "A backup is refused by a server that cannot give it" {
        restart_as 0 vanilla
        lassign [cli_backup 0 7 [tmpfile none.rdb]] status output
        assert_equal 1 $status
        assert_equal "The node cannot send single slots: it runs a server without CLUSTER BACKUP-SLOTS" $output
        restart_as 0 ours
    }
}

# ---- CLUSTER RESTORE-SLOTS ----

proc restore {n args} {
    R $n cluster restore-slots file {*}$args
}

# The node's directory gets a file of this name, with these slots as they are now.
proc backup_to_dir {n slots name} {
    set path [file join [file dirname [dump_file $n]] $name]
    backup $n $slots $path
    return $path
}

# Nodes 0 and 1 are masters, the others are their replicas.
# What node 0 saves has no sums; backups always have.
start_cluster 2 2 {tags {external:skip cluster} overrides {save {} repl-diskless-sync-delay 0 appendonly yes auto-aof-rewrite-percentage 0 \
        rdbchecksum no enable-protected-configs no}} {
    wait_replicas_up
    fill_here 0
    set dump [slots_dump 0 $::here]
    backup_to_dir 0 0-99,500 slots.rdb

    test "Slots that were lost are restored, on the replica and in the append-only file too" {
        fill_strings 0 [slots_of {200 210}] 100
        set others [slots_dump 0 [slots_of {200 210 1000 1100}]]
        set before [footprint 0]
        foreach slot $::here {R 0 eval {for i,k in ipairs(redis.call('cluster','getkeysinslot',ARGV[1],100000)) do redis.call('unlink',k) end} 0 $slot}
        assert_equal {} [slots_dump 0 $::here]
        set reply [restore 0 slots.rdb]
        assert_equal [list slots [llength $::here] keys [dict size $dump] keys-replaced 0] [lrange $reply 0 5]
        assert_same_dump $dump [slots_dump 0 $::here]
        assert_same_dump $others [slots_dump 0 [slots_of {200 210 1000 1100}]]
        wait_mate_agrees $::here
        assert_equal 1 [R 0 wait 1 5000]
        set digest [R 0 debug digest]
        assert_equal $digest [R [mate] debug digest]
        R 0 debug loadaof
        assert_equal $digest [R 0 debug digest]
        assert_same_dump $dump [slots_dump 0 $::here]
        wait_mate_agrees $::here
        wait_no_leftovers 0 $before
    }

    test "Keys are not touched without REPLACE, with it the slot is what it was in the file" {
        set dump [slots_dump 0 $::here]
        set all [R 0 debug digest]
        R 0 set [key_in 3 new] 1
        R 0 append [key_in 500 str:raw] x
        set digest [R 0 debug digest]
        assert_error "ERR slot 0 has * keys: say REPLACE to have them replaced by the file's; no slot was restored" {restore 0 slots.rdb}
        assert_equal $digest [R 0 debug digest]
        set reply [restore 0 slots.rdb slotsrange 0 4 500 500 9000 9001 replace]
        # 9000 belongs to somebody else, but the file has nothing of it.
        assert_equal {slots 6 9000-9001} [list {*}[lrange $reply 0 1] [lindex $reply 7]]
        assert_equal 0 [R 0 exists [key_in 3 new]]
        assert_same_dump $dump [slots_dump 0 $::here]
        assert_equal $all [R 0 debug digest]
        wait_mate_agrees $::here
        R 0 debug loadaof
        assert_equal $all [R 0 debug digest]
        restore 0 slots.rdb replace
        assert_equal $all [R 0 debug digest]
        wait_mate_agrees $::here
    }

    test "An extract and a save are restored from, too" {
        R 0 save
        assert_equal 0 [lindex [extract 7 [dump_file 0] [file join [file dirname [dump_file 0]] seven.rdb] --force] 0]
        R 0 del [key_in 7 str:int]
        restore 0 seven.rdb replace
        restore 0 dump.rdb slotsrange 7 7 replace
        assert_equal 12345 [R 0 get [key_in 7 str:int]]
        assert_equal $all [R 0 debug digest]
    }

    test "Who watches, waits for or caches a key hears of it" {
        set watch [connect 0]
        $watch watch [key_in 3 str:int]
        $watch multi
        $watch ping
        R 0 del [key_in 7 list:lp]
        set rd [send_command 0 blpop [key_in 7 list:lp] 0]
        wait_for_condition 500 10 {[status [Rn 0] blocked_clients] == 1} else {fail "it does not wait"}
        restore 0 slots.rdb slotsrange 3 3 7 7 replace
        assert_equal [list [key_in 7 list:lp] a] [$rd read]
        $rd close
        assert_equal {} [$watch exec]
        $watch close
        restore 0 slots.rdb slotsrange 7 7 replace
        wait_mate_agrees $::here
    }

    test "What cannot be restored is refused with a sentence, and nothing has changed" {
        set digest [R 0 debug digest]
        set dir [file dirname [dump_file 0]]
        write_file [file join $dir empty] ""
        write_file [file join $dir text] [string repeat "no RDB " 100]
        set bytes [read_file [file join $dir slots.rdb]]
        write_file [file join $dir cut.rdb] [string range $bytes 0 end-50]
        lassign [dict get [slots_in_file [file join $dir slots.rdb]] 7] keys expires length offset
        set at [expr {$offset+$length-1}]
        write_file [file join $dir bad.rdb] [string replace $bytes $at $at "\xee"]
        write_file /tmp/outside-[pid].rdb $bytes
        file link -symbolic [file join $dir link.rdb] /tmp/outside-[pid].rdb
        exec mkfifo [file join $dir fifo]
        foreach {args why} [list \
            {nofile.rdb} "*'nofile.rdb' is no file in this node's directory*" \
            "/tmp/outside-[pid].rdb" "*is no file in this node's directory*" \
            link.rdb "*is no file in this node's directory*" \
            "../[file tail $dir]x/slots.rdb" "*is no file in this node's directory*" \
            /etc/passwd "*is no file in this node's directory*" \
            . "*is no*" \
            fifo "*'fifo' is not a file*" \
            empty "*'empty' is not restored from: It is no RDB: *; no slot was restored" \
            text "*It is no RDB: it does not begin with REDIS.*" \
            cut.rdb "*It does not end as an RDB does*" \
            {bad.rdb replace} "*Slot 7 at offset $offset is damaged: *" \
            {slots.rdb slotsrange 9000 9001} "*It has none of these slots.*" \
            {slots.rdb slotsrange 5 4 replace} "*ends before it starts*" \
            {slots.rdb slotsrange replace} "*no slot range given*" \
            {slots.rdb all} "*syntax error at 'all'*" \
        ] {
            assert_error $why {restore 0 {*}$args}
        }
        file delete /tmp/outside-[pid].rdb
        foreach {n why} [list [mate] "*this node is a replica: *" 1 "*slot 0 is served by node *"] {
            file copy -force [file join $dir slots.rdb] [file join [file dirname [dump_file $n]] slots.rdb]
            assert_error $why {restore $n slots.rdb}
        }
        # Other slots of the damaged file are good.
        restore 0 bad.rdb slotsrange 0 6 replace
        set id [R 0 cluster migrate-slots slotsrange 5 5 node [node_id 1] hold]
        assert_error "*slot 5 is in slot migration $id: *" {restore 0 slots.rdb replace}
        R 0 cluster cancel-slot-migrations id $id
        wait_job_state 1 $id cancelled
        assert_error "*not allowed from script*" {R 0 eval {return redis.call('cluster','restore-slots','file','slots.rdb')} 0}
        assert_equal $digest [R 0 debug digest]
        wait_mate_agrees $::here
    }

    test "A value that is damaged, where no sum tells it, ends it at its slot, and the ones before are restored" {
        R 0 set [key_in 42 x] value
        R 0 set [key_in 43 x] value
        R 0 save
        set path [file join [file dirname [dump_file 0]] damaged.rdb]
        lassign [dict get [slots_in_file [dump_file 0]] 43] keys expires length offset
        # What stands behind the head of the section is a key's type.
        write_file $path [string replace [read_file [dump_file 0]] [expr {$offset+4}] [expr {$offset+4}] "\x7f"]
        R 0 set [key_in 42 x] other
        R 0 set [key_in 43 x] other
        assert_error "*'damaged.rdb' cannot be loaded: an unknown record of type 127 at offset *; 1 of 2 slots were restored before, *" {
            restore 0 damaged.rdb slotsrange 42 43 replace
        }
        assert_equal {value other} [list [R 0 get [key_in 42 x]] [R 0 get [key_in 43 x]]]
        wait_mate_agrees $::here
    }

    test "It ends when its client goes, and when the keys are flushed" {
        R 0 flushall
        R 0 config set rdbcompression no
        fill_strings 0 [slots_of {0 99}] 6000 5000
        backup_to_dir 0 0-99 large.rdb
        set log [count_log_message 0 "the client went"]
        set mate [mate]
        stop_node $mate
        set rd [send_command 0 cluster restore-slots file large.rdb replace]
        wait_for_condition 500 10 {[status [Rn 0] blocked_clients] == 1} else {fail "it does not wait"}
        assert_error "*slots are being restored from 'large.rdb': wait for its end*" {restore 0 large.rdb}
        $rd close
        wait_for_condition 1000 10 {[count_log_message 0 "the client went"] > $log} else {fail "it goes on"}
        set rd [send_command 0 cluster restore-slots file large.rdb replace]
        wait_for_condition 500 10 {[status [Rn 0] blocked_clients] == 1} else {fail "it does not wait"}
        R 0 flushall
        assert_error "*the node's keys were flushed in the middle; *" {$rd read}
        $rd close
        continue_node $mate
        restore 0 large.rdb replace
        assert_equal 6000 [R 0 dbsize]
        wait_replicas_up
        wait_mate_agrees $::here
    }

    test "Writers of other slots and of the slots go on, and replicas have the same" {
        wait_cluster_agrees
        restore 0 large.rdb replace
        set writers [start_writers 2 [slots_of {0 10 300 310}]]
        writers_acked $writers
        for {set i 0} {$i < 5} {incr i} {restore 0 large.rdb slotsrange 50 99 replace}
        stop_writers $writers
        wait_mate_agrees $::here
    }
}

# A file outside of the directory is for those who may configure the node.
start_cluster 1 0 {tags {external:skip cluster} overrides {save {} enable-protected-configs yes}} {
    test "With enable-protected-configs any file may be named" {
        fill_here 0
        set dump [slots_dump 0 $::here]
        set file [tmpfile any.rdb]
        backup 0 0-99,500 $file
        R 0 flushall
        R 0 config set dir [lindex [R 0 config get dir] 1]
        restore 0 [file normalize $file]
        assert_same_dump $dump [slots_dump 0 $::here]
        assert_error "*cannot be opened: No such file or directory*" {restore 0 /no/such/file}
    }
}
