// Command watch creates a task and prints every state it goes through until it runs.
//
//	go run ./examples/watch -controller 127.0.0.1:7070 -name tasks/products-dr \
//	  -etcd 127.0.0.1:2379 -root-path by-dev -nats nats://127.0.0.1:4222 \
//	  -source http://127.0.0.1:19530 -sink http://127.0.0.1:29530 -include 'default.*'
//
// It ends with 0 when the task runs, with 1 and the error's reason when it does not.
package main

import (
	"context"
	"crypto/rand"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	cdc "github.com/milvus-cdc/milvus-cdc/clients/go/milvuscdc/v1"
)

func main() {
	controller := flag.String("controller", "127.0.0.1:7070", "`host:port` of the controller, or of a proxy before it")
	name := flag.String("name", "tasks/from-go", "name of the task")
	etcd := flag.String("etcd", "127.0.0.1:2379", "`host:port` of the source's etcd")
	rootPath := flag.String("root-path", "by-dev", "the source's etcd.rootPath")
	nats := flag.String("nats", "nats://127.0.0.1:4222", "the source's message queue")
	source := flag.String("source", "http://127.0.0.1:19530", "the source's public API")
	sink := flag.String("sink", "http://127.0.0.1:29530", "the sink's public API")
	include := flag.String("include", "*.*", "comma-separated globs over database.collection")
	timeout := flag.Duration("timeout", time.Minute, "how long to wait for the task to run")
	flag.Parse()

	task := &cdc.Task{
		Name: *name,
		Source: &cdc.Source{
			Etcd:   &cdc.EtcdMetadata{Endpoints: []string{*etcd}, RootPath: *rootPath},
			Queue:  &cdc.Source_Nats{Nats: &cdc.NatsQueue{Url: *nats}},
			Milvus: &cdc.MilvusEndpoint{Uri: *source},
		},
		Sink:      &cdc.Sink{Kind: &cdc.Sink_Milvus{Milvus: &cdc.MilvusEndpoint{Uri: *sink}}},
		Selection: &cdc.Selection{Include: strings.Split(*include, ",")},
		Start:     &cdc.Start{At: &cdc.Start_Earliest{Earliest: &cdc.Earliest{}}},
	}

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, *timeout)
	defer cancel()
	if err := run(ctx, *controller, task); err != nil {
		fmt.Fprintln(os.Stderr, explain(err))
		os.Exit(1)
	}
}

func run(ctx context.Context, controller string, task *cdc.Task) error {
	connection, err := grpc.NewClient(controller, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer connection.Close()
	tasks := cdc.NewTaskServiceClient(connection)

	// With a request id the call may be repeated when its answer is lost: it creates one task.
	created, err := tasks.CreateTask(ctx, &cdc.CreateTaskRequest{Task: task, RequestId: newUUID()})
	if err != nil {
		return err
	}
	fmt.Printf("created %s uid %s\n", created.Task.Name, created.Task.Uid)
	return watch(ctx, tasks, task.Name)
}

// watch prints the task's states until it runs. A watch that breaks off goes on after the last revision seen.
func watch(ctx context.Context, tasks cdc.TaskServiceClient, name string) error {
	var revision int64 // 0 asks for a snapshot
	for {
		stream, err := tasks.WatchTasks(ctx, &cdc.WatchTasksRequest{Name: name, Revision: revision})
		if err != nil {
			return err
		}
		for {
			event, err := stream.Recv()
			if errors.Is(err, io.EOF) || (revision > 0 && status.Code(err) == codes.Unavailable) {
				break
			}
			if err != nil {
				return err
			}
			revision = event.Revision
			switch event.Type {
			case cdc.WatchTasksResponse_TYPE_DELETED:
				return fmt.Errorf("%s was deleted", name)
			case cdc.WatchTasksResponse_TYPE_ADDED, cdc.WatchTasksResponse_TYPE_MODIFIED:
				if done, err := report(event.Task); done || err != nil {
					return err
				}
			}
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(time.Second):
		}
	}
}

// report prints where the task is; done when all its collections run.
func report(task *cdc.Task) (done bool, err error) {
	state := strings.TrimPrefix(task.State.String(), "TASK_STATE_")
	progress := task.GetProgress()
	fmt.Printf("%s %s %d of %d collections running %s %s\n",
		task.Name, state, progress.GetCollectionsRunning(), progress.GetCollections(), task.Reason, task.Message)
	switch task.State {
	case cdc.TaskState_TASK_STATE_FAILED, cdc.TaskState_TASK_STATE_DELETING:
		return true, fmt.Errorf("%s is %s: %s: %s", task.Name, state, task.Reason, task.Message)
	case cdc.TaskState_TASK_STATE_RUNNING:
		return progress.GetCollectionsRunning() == progress.GetCollections(), nil
	}
	return false, nil
}

// explain turns an error of the API into its code, its reason for programs and its message for people.
func explain(err error) string {
	answer, ok := status.FromError(err)
	if !ok {
		return err.Error()
	}
	text := fmt.Sprintf("%s: %s", answer.Code(), answer.Message())
	for _, detail := range answer.Details() {
		if info, ok := detail.(*errdetails.ErrorInfo); ok {
			text += fmt.Sprintf("\nreason %s of %s %v", info.Reason, info.Domain, info.Metadata)
		}
	}
	return text
}

func newUUID() string {
	var b [16]byte
	rand.Read(b[:])
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}
