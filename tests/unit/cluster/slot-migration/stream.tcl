# Writes to the slots while they move arrive at the target, whether they are
# queued for a section that is still to come or applied to keys that are there.

source tests/support/slot_migration.tcl

set ::slots {5 6 7}

# Keys to write to, made before the migration starts.
proc fill {} {
    foreach slot $::slots {
        foreach {name command} {
            counter {set % 10}          text {set % "some text"}    gone {set % x}
            list {rpush % a b c d e f}  list2 {rpush % x}           set {sadd % a b c d e f g h}
            set2 {sadd % b d f z}       zset {zadd % 1 a 2 b 3 c 4 d} zset2 {zadd % 5 a 6 z}
            hash {hset % a 1 b 2 c 3 d 4 e 5} geo {geoadd % 13.3 38.1 Palermo 15.0 37.5 Catania}
            hll {pfadd % a b c}         hll2 {pfadd % c d e}        bits {set % abc}
            bits2 {set % bcd}           renamed {set % r}           copied {hset % f v g w}
            popped {set % p}            numbers {rpush % 3 1 2}     volatile {set % v px 100000000}
            stream {xadd % 1-1 a b}     expired {set % x}           vset {vadd % values 2 1 0 first}
        } {
            R 0 {*}[lreplace $command 1 1 [key_in $slot $name]]
        }
        for {set i 2} {$i <= 60} {incr i} {R 0 xadd [key_in $slot stream] $i-1 f $i}
        R 0 xgroup create [key_in $slot stream] g 0
        R 0 hpexpire [key_in $slot copied] 100000000 fields 1 f
        for {set i 0} {$i < 600} {incr i} {R 0 hset [key_in $slot bighash] f$i $i}
    }
}

# Each kind of write once. Nothing here is random but what SPOP does.
proc write_all_kinds {} {
    R 0 script flush
    R 0 function load replace {#!lua name=lib
        redis.register_function('write', function(keys, args)
            redis.call('incr', keys[1])
            return redis.call('rpush', keys[2], args[1], redis.call('time')[1])
        end)}
    foreach slot $::slots {
        foreach name {counter text gone list list2 set set2 zset zset2 hash geo hll hll2 bits bits2 renamed
                      copied popped numbers volatile stream expired vset bighash new out} {
            set $name [key_in $slot $name]
        }
        foreach name {a b c d e f g h i j k l m n o p q r s t u v w x y z} {set n$name [key_in $slot new:$name]}
        set r [Rn 0]

        $r incr $counter; $r incrby $counter 5; $r decr $counter; $r incrbyfloat $counter 0.5
        $r append $text more; $r setrange $text 20 end; $r getset $gone y; $r getdel $popped
        $r set $na 1 ex 100000; $r set $nb 1 keepttl; $r setnx $nc 1; $r mset $nd 1 $ne 2; $r msetnx $nf 1 $ng 2
        $r getex $na px 200000000; $r getex $volatile persist; $r setbit $bits 9 1; $r bitfield $bits set u8 0 7 incrby i4 8 1
        $r bitop and $nh $bits $bits2; $r bitop not $ni $bits2; $r restore $nj 0 [$r dump $hash]
        $r restore $nj 5000000 [$r dump $list] replace freq 100
        # A counter whose TTL passes on its way
        $r set $nk 5 px 1
        wait_for_condition 100 5 {[R 0 pttl $nk] == -2} else {fail "the key does not expire"}
        $r incr $nk

        $r rpush $list g h; $r lpush $list 0; $r lpop $list; $r rpop $list 2; $r lset $list 0 first; $r linsert $list before c mid
        $r lrem $list 1 d; $r ltrim $list 0 3; $r lmove $list $list2 left right; $r rpoplpush $list $list2
        $r lmpop 2 $nl $list2 left count 1; $r lpushx $list x; $r rpushx $nl x; $r blpop $list 1; $r blmove $list2 $nm left left 1
        set blocked [redis_deferring_client 0]
        $blocked brpop $nn 0
        wait_for_blocked_clients_count 1
        $r rpush $nn one two
        assert_equal [list $nn two] [$blocked read]
        $blocked bzpopmax $no 0
        wait_for_blocked_clients_count 1
        $r zadd $no 1 one 2 two
        $blocked read
        $blocked blmove $nz $ny left right 0
        wait_for_blocked_clients_count 1
        $r rpush $nz v w
        $blocked read
        $blocked close
        $r sort $numbers store $out; $r sort $numbers by nosort get # store $ny

        $r sadd $set i j; $r srem $set a; $r spop $set; $r spop $set 2; $r smove $set2 $set z; $r sinterstore $np $set $set2
        $r sunionstore $nq $set $set2; $r sdiffstore $nr $set $set2; $r sinterstore $gone $ns $nt

        $r zadd $zset gt ch 9 a; $r zincrby $zset 2 b; $r zrem $zset c; $r zpopmin $zset; $r zunionstore $ns 2 $zset $zset2 weights 2 3
        $r zinterstore $nt 2 $zset $zset2; $r zdiffstore $nu 2 $zset2 $zset; $r zrangestore $nv $zset2 0 -1
        $r zremrangebyrank $zset2 0 0; $r zremrangebyscore $zset2 100 200; $r zremrangebylex $zset2 - (a; $r zmpop 1 $zset max
        $r geoadd $geo 1 1 new; $r geosearchstore $nw $geo fromlonlat 15 37 byradius 200 km

        $r hset $hash a 9 n 1; $r hsetnx $hash m 1; $r hincrby $hash b 3; $r hincrbyfloat $hash c 0.25; $r hdel $hash d
        $r hpexpire $hash 100000000 fields 2 a b; $r hpersist $hash fields 1 b; $r hexpireat $hash 5000000000 fields 1 c
        $r hpexpireat $hash 1 fields 1 e; $r hgetex $hash px 300000000 fields 1 m; $r hgetdel $hash fields 1 n
        $r hsetex $hash fxx px 400000000 fields 1 m 2; $r hsetex $nx ex 300000 fields 2 p 1 q 2; $r hexpire $nx 0 fields 1 p
        $r hpexpire $bighash 1 fields 3 f1 f2 f3; $r hpexpire $bighash 200000000 fields 2 f4 f5; $r hdel $bighash f4

        $r pfadd $hll x y; $r pfcount $hll; $r pfmerge $hll2 $hll; $r pfcount $hll2
        $r rename $renamed $new; $r renamenx $new $renamed; $r copy $copied $new db 0; $r copy $copied $new replace
        $r rename $copied $copied:moved; $r hdel $copied:moved f
        $r expire $text 1000000; $r pexpireat $expired 1; $r expireat $bits2 5000000000; $r persist $na; $r pexpire $set 90000000
        $r del $nb $nc; $r unlink $nd $ne

        $r xadd $stream 100-1 f v; $r xadd $stream nomkstream maxlen 50 101-* f v; $r xadd $stream * f v; $r xdel $stream 30-1
        $r xreadgroup group g alice count 3 streams $stream >; $r xreadgroup group g bob count 2 noack streams $stream >
        $r xack $stream g 12-1; $r xclaim $stream g carol 0 13-1 justid; $r xclaim $stream g carol 0 14-1 force retrycount 5
        $r xautoclaim $stream g dave 0 - count 2; $r xgroup create $stream g2 $ entriesread 3; $r xgroup setid $stream g2 0
        $r xgroup createconsumer $stream g2 erin; $r xgroup delconsumer $stream g bob; $r xgroup destroy $stream g2
        $r xgroup create $nl:stream g $ mkstream; $r xtrim $stream maxlen 45; $r xsetid $stream 9999999999999-9
        $r xadd $stream 9999999999999-10 last one

        $r vadd $vset values 2 0 1 second setattr {{"a":1}}; $r vadd $vset values 2 1 1 third; $r vrem $vset first
        $r vsetattr $vset third {{"b":2}}

        $r multi; $r incr $nf; $r rpush $list in transaction; $r del $ng; $r hset $hash in transaction; $r exec
        $r eval {redis.call('set',KEYS[1],'by script','px',50000000); redis.call('incr',KEYS[2]); redis.call('spop',KEYS[3])
                 return redis.call('sadd',KEYS[4],redis.call('time')[2])} 4 $gone $nf $nq $nr
        $r fcall write 2 $nf $list by-function
    }
}

# Without what no replica would have in common with its master either.
proc streamed_dump {n} {
    set dump [slots_dump $n $::slots]
    dict for {key about} $dump {
        # A consumer's times are those of the node that runs the command.
        if {[lindex $about 0] eq "stream"} {
            set about [regsub -all {(seen-time|active-time) -?\d+} $about {\1 -}]
        }
        # VADD draws its levels by itself on every node.
        if {[lindex $about 0] eq "vectorset"} {
            set about [regsub {max-level \d+} $about -]
        }
        dict set dump $key $about
    }
    return $dump
}

start_cluster 3 0 {tags {external:skip cluster}} {
    foreach {where point node state} {
        "queued for sections to come" target_before_section 2 snapshot
        "applied to keys that are there" source_before_cut 0 streaming
    } {
        test "Writes of every kind during a migration arrive, $where" {
            fresh
            fill
            failpoint 0 source_before_cut pause
            failpoint $node $point pause
            set id [migrate 0 2 5 7]
            wait_job_state 0 $id $state
            write_all_kinds
            foreach slot $::slots {
                wait_for_condition 500 10 {[R 0 hlen [key_in $slot bighash]] == 596} else {fail "the fields do not expire"}
            }
            assert_equal $state [job_field 0 $id state]
            assert_equal 0 [R 2 dbsize]
            failpoint 2 target_before_section off
            wait_job_state 0 $id streaming
            # What is due but not deleted yet goes to the target as the source deletes it.
            wait_for_condition 500 10 {[job_field 0 $id stream-lag-bytes] == 0} else {fail "the target lags: [job 0 $id]"}
            set before [streamed_dump 0]
            failpoint 0 source_before_cut off
            wait_migrated 0 2 $id
            assert_same_dump $before [streamed_dump 2]
            assert_equal 1 [job_field 0 $id attempt]
            assert_equal 0 [R 0 dbsize]
        }
    }

    foreach way {lazily actively} {
        test "Keys and fields that expire $way at the source during a migration are gone at the target" {
            fresh
            R 0 debug set-active-expire [expr {$way eq "actively"}]
            R 2 debug set-active-expire 0
            foreach slot $::slots {
                for {set i 0} {$i < 20} {incr i} {
                    R 0 set [key_in $slot due$i] x px 400
                    R 0 hset [key_in $slot hash$i] f v g w
                    R 0 hpexpire [key_in $slot hash$i] 400 fields 1 f
                    R 0 hset [key_in $slot whole$i] f v
                    R 0 hpexpire [key_in $slot whole$i] 400 fields 1 f
                }
            }
            failpoint 0 source_before_cut pause
            set id [migrate 0 2 5 7]
            wait_job_state 0 $id streaming
            wait_for_condition 500 10 {[R 0 hpttl [key_in 7 whole19] fields 1 f] eq -2 && [R 0 pttl [key_in 7 due19]] == -2} else {fail "no expiry"}
            if {$way eq "lazily"} {
                foreach slot $::slots {for {set i 0} {$i < 20} {incr i} {
                    assert_equal "" [R 0 get [key_in $slot due$i]]
                    assert_equal 1 [R 0 hsetnx [key_in $slot hash$i] f again]
                    assert_equal 1 [R 0 hsetnx [key_in $slot whole$i] h again]
                }}
            } else {
                wait_for_condition 500 10 {[R 0 dbsize] == 60 && [keyspace_field 0 subexpiry] == 0} else {fail "[R 0 info keyspace]"}
            }
            set before [streamed_dump 0]
            failpoint 0 source_before_cut off
            wait_migrated 0 2 $id
            assert_same_dump $before [streamed_dump 2]
            assert_equal [dict size $before] [R 2 dbsize]
            assert_equal 0 [keyspace_field 2 expires]
        }
    }

    test "Keys that the source evicts during a migration are gone at the target" {
        fresh
        fill_strings 0 $::slots 2000 1000
        failpoint 0 source_before_cut pause
        set id [migrate 0 2 5 7]
        wait_job_state 0 $id streaming
        R 0 config set maxmemory-policy allkeys-random
        R 0 config set maxmemory [expr {[status [Rn 0] used_memory]-1000000}]
        R 0 set [key_in 5 one-more] x
        wait_for_condition 500 10 {[R 0 dbsize] < 1500} else {fail "nothing is evicted"}
        R 0 config set maxmemory 0
        R 0 config set maxmemory-policy noeviction
        set before [streamed_dump 0]
        failpoint 0 source_before_cut off
        wait_migrated 0 2 $id
        assert_same_dump $before [streamed_dump 2]
    }

    test "Writes to other slots and other nodes are not streamed" {
        fresh
        failpoint 0 source_before_cut pause
        set id [migrate 0 2 5 7]
        wait_job_state 0 $id streaming
        for {set i 0} {$i < 100} {incr i} {R 0 set [key_in 8 k$i] x}
        R 0 publish channel message
        assert_equal 0 [job_field 0 $id stream-bytes]
        R 0 set [key_in 7 k] x
        assert_morethan [job_field 0 $id stream-bytes] 0
        failpoint 0 source_before_cut off
        wait_migrated 0 2 $id
        assert_equal 1 [R 2 dbsize]
        assert_equal 100 [R 0 dbsize]
    }

    test "COPY with its database named more than once stays within the slots that move" {
        fresh
        R 0 set [key_in 5 k] x
        failpoint 0 source_before_cut pause
        set id [migrate 0 2 5 7]
        wait_job_state 0 $id streaming
        assert_equal 1 [R 0 copy [key_in 5 k] [key_in 5 copy] db 0 db 0]
        wait_for_condition 500 10 {[job_field 0 $id stream-lag-bytes] == 0} else {fail "the target lags"}
        assert_equal 0 [R 2 dbsize]
        failpoint 0 source_before_cut off
        wait_migrated 0 2 $id
        assert_equal x [R 2 get [key_in 5 copy]]
    }

    test "A write of megabytes and thousands of small ones are streamed whole and in order" {
        fresh
        failpoint 0 source_before_cut pause
        set id [migrate 0 2 5 7]
        wait_job_state 0 $id streaming
        R 0 set [key_in 5 big] [string repeat 0123456789 800000]
        set rd [redis_deferring_client 0]
        for {set i 0} {$i < 5000} {incr i} {$rd rpush [key_in 6 list] $i}
        for {set i 0} {$i < 5000} {incr i} {$rd read}
        $rd close
        set before [streamed_dump 0]
        failpoint 0 source_before_cut off
        wait_migrated 0 2 $id
        assert_same_dump $before [streamed_dump 2]
        assert_equal 5000 [R 2 llen [key_in 6 list]]
    }
}
