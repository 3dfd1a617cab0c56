# Every kind of key arrives at the target as it was, and works there.

source tests/support/slot_migration.tcl

start_cluster 3 0 {tags {external:skip cluster}} {
    set slots {0 1 7 100 200}

    test "Every type in every encoding is the same at the target" {
        fresh
        foreach slot $slots {fill_all_types 0 $slot [expr {$slot == 100}]}
        set before [slots_dump 0 $slots]
        set digest [R 0 debug digest]
        assert_morethan [dict size $before] 150
        # The kinds that are meant to be there are there.
        foreach {name encoding} {
            str:int int str:emb raw str:raw raw hash:lp listpack hash:ht hashtable hash:lpttl listpackex
            hash:htttl hashtable list:lp listpack list:ql quicklist list:plain quicklist set:int intset
            set:lp listpack set:ht hashtable zset:lp listpack zset:sl skiplist stream stream big:list quicklist
        } {
            assert_equal $encoding [lindex [dict get $before [key_in 100 $name]] 1] $name
        }
        move_slots 0 2 0 200
        assert_same_dump $before [slots_dump 2 $slots]
        assert_equal $digest [R 2 debug digest]
        assert_equal {} [slots_dump 0 $slots]
        assert_equal "" [keyspace 0]
    }

    test "Counts of keys, expires and hashes with field TTLs move with the slots" {
        fresh
        foreach slot $slots {fill_all_types 0 $slot}
        set before [keyspace 0]
        move_slots 0 2 0 200
        assert_equal [R 2 dbsize] [llength [keys_in_slots 2 $slots]]
        assert_equal [keyspace_field 2 expires] [expr {3*[llength $slots]}]
        assert_equal [keyspace_field 2 subexpiry] [expr {2*[llength $slots]}]
        # avg_ttl is an estimate that each node makes for itself
        foreach field {keys expires subexpiry} {
            regexp "$field=(\\d+)" $before -> count
            assert_equal $count [keyspace_field 2 $field] $field
            assert_equal 0 [keyspace_field 0 $field] $field
        }
    }

    test "SCAN, KEYS, RANDOMKEY and CLUSTER GETKEYSINSLOT find the moved keys and no others" {
        fresh
        foreach slot $slots {fill_all_types 0 $slot}
        move_slots 0 2 0 99
        set expected [lsort [concat [keys_in_slots 2 {0 1 7}]]]
        set found {}
        set cursor 0
        while 1 {
            lassign [R 2 scan $cursor count 50] cursor keys
            lappend found {*}$keys
            if {$cursor == 0} break
        }
        assert_equal $expected [lsort -unique $found]
        assert_equal $expected [lsort [R 2 keys *]]
        assert_not_equal -1 [lsearch -exact $expected [R 2 randomkey]]
        assert_equal [R 2 dbsize] [llength $expected]
        assert_equal 0 [R 0 cluster countkeysinslot 7]
        assert_equal [llength [keys_in_slots 0 {100 200}]] [R 0 dbsize]
    }

    test "Moved keys can be written, renamed, copied and deleted" {
        fresh
        foreach slot $slots {fill_all_types 0 $slot}
        set before [slots_dump 0 $slots]
        move_slots 0 1 0 200
        foreach slot $slots {
            foreach name {hash:lpttl hash:htttl} {
                set key [key_in $slot $name]
                set fields [R 1 hlen $key]
                assert_equal 1 [R 1 copy $key $key:copy]
                R 1 rename $key $key:new
                assert_equal 0 [R 1 exists $key]
                assert_equal $fields [R 1 hlen $key:new]
                assert_equal $fields [R 1 hlen $key:copy]
                set some [lrange [R 1 hkeys $key:new] 0 1]
                assert_equal 2 [R 1 hdel $key:new {*}$some]
                assert_equal 1 [R 1 hset $key:new added 1]
                R 1 hpexpire $key:new 100000000 fields 1 added
                assert_morethan [R 1 hpttl $key:new fields 1 added] 0
                R 1 rename $key:copy $key
                # As it was, but for the one that is new.
                assert_equal [dict get $before $key] [dict get [slots_dump 1 $slot] $key]
                assert_equal 1 [R 1 del $key:new]
            }
            assert_equal 12346 [R 1 incr [key_in $slot str:int]]
            assert_equal 10 [R 1 append [key_in $slot str:emb] 12345]
            assert_equal 1 [R 1 persist [key_in $slot str:ttl]]
            assert_equal 5 [R 1 rpush [key_in $slot list:lp] more]
            assert_equal 3001 [R 1 lpush [key_in $slot list:ql] more]
            assert_equal 1 [R 1 sadd [key_in $slot set:int] 9999]
            assert_equal 1 [R 1 srem [key_in $slot set:ht] m1]
            assert_equal 1 [R 1 zadd [key_in $slot zset:sl] 5 more]
            assert_equal 1 [R 1 pfadd [key_in $slot hll] another-one]
            assert_equal 1 [R 1 setbit [key_in $slot bitmap] 7 0; R 1 getbit [key_in $slot bitmap] 100001]
            assert_equal 1 [R 1 geoadd [key_in $slot geo] 1 1 new]
            R 1 xadd [key_in $slot stream] * more 1
            assert_equal 3 [llength [lindex [R 1 xreadgroup group g2 carol count 3 streams [key_in $slot stream] >] 0 1]]
            assert_equal 1 [R 1 xack [key_in $slot stream] g1 3-1]
            assert_equal 1 [R 1 vadd [key_in $slot vset:q8] values 3 1 1 1 more q8]
            assert_equal e3 [lindex [R 1 vsim [key_in $slot vset:q8] ele e3 count 1] 0]
        }
        set changed [slots_dump 1 $slots]
        R 1 debug reload
        assert_same_dump $changed [slots_dump 1 $slots]
        foreach slot $slots {foreach key [keys_in_slots 1 $slot] {R 1 del $key}}
        assert_equal 0 [R 1 dbsize]
        assert_equal 0 [keyspace_field 1 expires]
        assert_equal 0 [keyspace_field 1 subexpiry]
        assert_equal PONG [R 1 ping]
    }

    test "Keys and fields with a TTL expire at the target, when they are due" {
        fresh
        foreach slot $slots {
            foreach i {1 2 3} {
                R 0 set [key_in $slot due:$i] x px 1500
                R 0 hset [key_in $slot hash:$i] gone 1 stays 2
                R 0 hpexpire [key_in $slot hash:$i] 1500 fields 1 gone
                R 0 hset [key_in $slot emptied:$i] gone 1
                R 0 hpexpire [key_in $slot emptied:$i] 1500 fields 1 gone
                for {set f 0} {$f < 600} {incr f} {R 0 hset [key_in $slot big:$i] f$f $f}
                R 0 hpexpire [key_in $slot big:$i] 1500 fields 2 f5 f6
            }
        }
        move_slots 0 2 0 200
        # Nobody reads them: the active cycles find them.
        wait_for_condition 1000 10 {[R 2 dbsize] == 6*[llength $slots] && [keyspace_field 2 subexpiry] == 0} else {
            fail "not all that is due has expired: [R 2 info keyspace]"
        }
        foreach slot $slots {
            foreach i {1 2 3} {
                assert_equal stays [R 2 hkeys [key_in $slot hash:$i]]
                assert_equal 598 [R 2 hlen [key_in $slot big:$i]]
            }
        }
    }

    test "Hundreds of hashes whose fields expire at few times, or each at its own" {
        fresh
        set begin [expr {[clock milliseconds]+100000000}]
        set times {}
        foreach slot $slots {
            for {set i 0} {$i < 150} {incr i} {
                set key [key_in $slot hash:$i]
                R 0 hset $key f 1 g 2
                if {$i%10 == 0} {for {set f 0} {$f < 600} {incr f} {lappend more f$f $f}; R 0 hset $key {*}$more; unset more}
                set when [expr {$i%3 ? $begin+$i%3 : $begin-1000+($i*7919)%2000}]
                R 0 hpexpireat $key $when fields 1 f
                dict set times $key $when
            }
        }
        move_slots 0 2 0 200
        dict for {key when} $times {assert_equal "$key $when" "$key [R 2 hpexpiretime $key fields 1 f]"}
        assert_equal [dict size $times] [keyspace_field 2 subexpiry]
        # Each is found again in its place.
        set n 0
        dict for {key when} $times {
            switch [expr {[incr n]%3}] {
                0 {R 2 del $key}
                1 {R 2 hpersist $key fields 1 f}
                2 {R 2 hpexpire $key 1 fields 1 f}
            }
        }
        # HPERSIST leaves its hash in its place, empty-handed.
        wait_for_condition 500 10 {[keyspace_field 2 subexpiry] == [dict size $times]/3} else {fail "fields stay: [R 2 info keyspace]"}
        set n 0
        dict for {key when} $times {
            assert_equal "$key [expr {[incr n]%3 == 1}]" "$key [R 2 hexists $key f]"
        }
    }

    test "A key and a field that expired before they were moved are gone at both nodes" {
        fresh
        foreach n {0 2} {R $n debug set-active-expire 0}
        foreach slot $slots {
            R 0 set [key_in $slot gone] x px 1
            R 0 set [key_in $slot stays] x
            R 0 hset [key_in $slot hash] f v g w
            R 0 hpexpire [key_in $slot hash] 1 fields 1 f
        }
        wait_for_condition 100 10 {[R 0 hpttl [key_in 200 hash] fields 1 f] eq -2} else {fail "the field does not expire"}
        move_slots 0 2 0 200
        foreach slot $slots {
            assert_equal "" [R 2 get [key_in $slot gone]]
            assert_equal g [R 2 hkeys [key_in $slot hash]]
        }
        foreach n {0 2} {R $n debug set-active-expire 1}
        wait_for_condition 500 10 {[R 2 dbsize] == 2*[llength $slots] && [keyspace_field 2 subexpiry] == 0} else {
            fail "expired keys stay: [R 2 info keyspace]"
        }
        assert_equal 0 [R 0 dbsize]
    }

    test "LFU counters and idle times move with the keys" {
        fresh
        foreach n {0 2} {
            R $n config set maxmemory-policy allkeys-lfu lfu-decay-time 0
        }
        for {set i 0} {$i < 40} {incr i} {
            R 0 set [key_in 7 lfu$i] x
            R 0 restore [key_in 7 other$i] 0 [R 0 dump [key_in 7 lfu$i]] freq [expr {6*$i}]
        }
        set before [slots_dump 0 7 freq]
        assert_equal 234 [lindex [dict get $before [key_in 7 other39]] end]
        move_slots 0 2 7 7
        assert_same_dump $before [slots_dump 2 7 freq]
        foreach n {0 2} {
            R $n flushall
            R $n config set maxmemory-policy allkeys-lru
        }
        R 2 set [key_in 7 a] x
        set value [R 2 dump [key_in 7 a]]
        for {set i 0} {$i < 40} {incr i} {R 2 restore [key_in 7 idle$i] 0 $value idletime [expr {1000*$i}]}
        set times {}
        for {set i 0} {$i < 40} {incr i} {lappend times [R 2 object idletime [key_in 7 idle$i]]}
        move_slots 2 0 7 7
        for {set i 0} {$i < 40} {incr i} {
            # The clock went on by the duration of the move.
            assert_range [R 0 object idletime [key_in 7 idle$i]] [expr {[lindex $times $i]-10}] [expr {[lindex $times $i]+60}]
        }
        foreach n {0 2} {
            R $n flushall
            R $n config set maxmemory-policy noeviction
        }
    }

    test "Empty slots, the first and the last slot move" {
        fresh
        R 0 set [key_in 0 first] 1
        R 2 set [key_in 16383 last] 2
        move_slots 0 1 0 0 300 400
        move_slots 2 1 16383 16383
        assert_equal 1 [R 1 get [key_in 0 first]]
        assert_equal 2 [R 1 get [key_in 16383 last]]
        assert_equal 1 [slot_owner 2 350]
        assert_equal 2 [R 1 dbsize]
    }

    test "A slot of 100000 keys moves with all of them" {
        fresh
        fill_strings 0 3000 100000
        set digest [R 0 debug digest]
        move_slots 0 1 3000 3000
        assert_equal 100000 [R 1 cluster countkeysinslot 3000]
        assert_equal 100000 [R 1 dbsize]
        assert_equal $digest [R 1 debug digest]
        assert_equal 0 [R 0 dbsize]
    }

    test "Functions of the target are not touched by a move" {
        fresh
        R 0 function load {#!lua name=lib
            redis.register_function('version', function() return 'of the source' end)}
        R 2 function load {#!lua name=lib
            redis.register_function('version', function() return 'of the target' end)}
        R 0 set [key_in 5 a] x
        move_slots 0 2 5 5
        assert_equal "of the target" [R 2 fcall version 0]
        assert_equal "of the source" [R 0 fcall version 0]
        foreach n {0 2} {R $n function flush}
    }

    test "All slots of a node move, and back" {
        fresh
        R 0 config set cluster-allow-replica-migration no
        fill_strings 0 [slots_of {0 5461}] 20000
        fill_all_types 0 5461
        set digest [R 0 debug digest]
        set keys [R 0 dbsize]
        move_slots 0 1 0 5461
        assert_equal $keys [R 1 dbsize]
        assert_equal $digest [R 1 debug digest]
        assert_equal 0 [R 0 dbsize]
        assert_match {*myself,master*} [R 0 cluster nodes]
        move_slots 1 0 0 5461
        assert_equal $digest [R 0 debug digest]
        assert_equal 0 [R 1 dbsize]
    }

    test "A node whose last slot moved away becomes a replica of the target, as upstream's do" {
        fresh
        fill_all_types 0 5461
        set digest [R 0 debug digest]
        R 0 config set cluster-allow-replica-migration yes
        set id [migrate 0 1 0 5461]
        wait_job_state 1 $id done
        wait_for_condition 1000 10 {[dict get [cluster_get_myself 0] slaveof] eq [node_id 1]} else {
            fail "node 0 is no replica of node 1: [R 0 cluster nodes]"
        }
        wait_for_condition 1000 20 {[status [Rn 0] master_link_status] eq "up"} else {fail "the replica does not attach"}
        assert_equal $digest [R 1 debug digest]
        wait_for_ofs_sync [Rn 0] [Rn 1]
        assert_equal $digest [R 0 debug digest]
    }
}
