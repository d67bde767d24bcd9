import java.nio.charset.StandardCharsets;
import java.time.Duration;
import java.util.*;
import java.util.stream.Collectors;
import org.apache.kafka.clients.consumer.*;
import org.apache.kafka.clients.producer.internals.BuiltInPartitioner;
import org.apache.kafka.common.TopicPartition;
import org.apache.kafka.common.serialization.StringDeserializer;

/** Kafka's own Java client: where it would put keys, and what it reads. */
public class kafka_peer {
  public static void main(String[] args) {
    if (args[0].equals("place")) {
      int partitions = Integer.parseInt(args[1]);
      Scanner keys = new Scanner(System.in, StandardCharsets.UTF_8);
      while (keys.hasNextLine()) {
        byte[] key = keys.nextLine().getBytes(StandardCharsets.UTF_8);
        System.out.println(BuiltInPartitioner.partitionForKey(key, partitions));
      }
      return;
    }
    Properties settings = new Properties();
    settings.put("bootstrap.servers", args[1]);
    settings.put("isolation.level", "read_committed");
    settings.put("key.deserializer", StringDeserializer.class.getName());
    settings.put("value.deserializer", StringDeserializer.class.getName());
    try (KafkaConsumer<String, String> consumer = new KafkaConsumer<>(settings)) {
      List<TopicPartition> all = consumer.partitionsFor(args[2]).stream()
          .map(p -> new TopicPartition(p.topic(), p.partition())).collect(Collectors.toList());
      consumer.assign(all);
      consumer.seekToBeginning(all);
      Map<TopicPartition, Long> ends = consumer.endOffsets(all);
      while (all.stream().anyMatch(p -> consumer.position(p) < ends.get(p))) {
        for (ConsumerRecord<String, String> r : consumer.poll(Duration.ofMillis(200))) {
          System.out.println(r.partition() + "\t" + r.key() + "\t" + r.value());
        }
      }
    }
  }
}
