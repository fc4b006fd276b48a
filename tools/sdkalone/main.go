// sdkalone puts a file into a bucket, or gets it back, with the AWS SDK and nothing else:
// no compression, no checksum of the content, no test whether the object is there
// already. The benchmark compares with it. The endpoint and the keys come from the
// SDK's own environment variables.
package main

import (
	"context"
	"fmt"
	"io"
	"os"

	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/feature/s3/transfermanager"
	"github.com/aws/aws-sdk-go-v2/service/s3"
)

const singlePut = 16 << 20 // a WAL segment: larger files go in parts, several at once

func main() {
	if len(os.Args) != 5 || os.Args[1] != "put" && os.Args[1] != "get" {
		fmt.Fprintln(os.Stderr, "Usage: sdkalone put|get BUCKET KEY FILE")
		os.Exit(2)
	}
	if err := transfer(context.Background(), os.Args[1] == "put", os.Args[2], os.Args[3], os.Args[4]); err != nil {
		fmt.Fprintln(os.Stderr, "sdkalone:", err)
		os.Exit(1)
	}
}

func transfer(ctx context.Context, put bool, bucket, key, file string) error {
	cfg, err := config.LoadDefaultConfig(ctx)
	if err != nil {
		return err
	}
	client := s3.NewFromConfig(cfg, func(o *s3.Options) { o.UsePathStyle = true })
	if !put {
		out, err := client.GetObject(ctx, &s3.GetObjectInput{Bucket: &bucket, Key: &key})
		if err != nil {
			return err
		}
		defer out.Body.Close()
		f, err := os.Create(file)
		if err != nil {
			return err
		}
		if _, err := io.Copy(f, out.Body); err != nil {
			return err
		}
		return f.Close()
	}
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil {
		return err
	} else if info.Size() > singlePut {
		_, err = transfermanager.New(client).UploadObject(ctx, &transfermanager.UploadObjectInput{Bucket: &bucket, Key: &key, Body: f})
		return err
	}
	_, err = client.PutObject(ctx, &s3.PutObjectInput{Bucket: &bucket, Key: &key, Body: f})
	return err
}
