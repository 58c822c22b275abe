"""The table of known datasets: what each holds, where it lies, how it is read, where it comes from.

One `Known` per dataset and nothing else: finding files is `adaptkit.data.known`, reading index files
`adaptkit.data.readers`, downloading `adaptkit.data.prepare`. Sizes are those of the split that results are compared on
(CoOp's, where there is one).

Source: datasets sheet, sections 1-8. Addresses and md5 sums of archives are those torchvision 0.29 and torchgeo hold;
that of CUB-200-2011 is CaltechDATA's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from adaptkit.data.catalogue_names import COUNTRIES, GTSRB_NAMES
from adaptkit.types import DEFAULT_TEMPLATES

Reader = Literal[
    "folders", "pets", "cars", "flowers", "sun397", "ucf101", "aircraft", "cub", "dogs", "resisc45", "gtsrb",
    "split-folders", "imagenet", "torchvision",
]  # fmt: skip
"""Which function of `adaptkit.data.readers` knows the dataset's own index files (or needs none)."""


@dataclass(frozen=True)
class Layout:
    """One way in which a dataset lies on disk.

    Args:
        folder: Its folder below the data root, "" for the root itself. Index files lie there.
        images: The folder in it that listed paths are relative to; "" for `folder` itself.
        parts: Sub-folders of the image folder by split, for datasets whose folders are the split.
    """

    folder: str
    images: str = ""
    parts: Mapping[str, str] = field(default_factory=dict)

    @property
    def image_path(self) -> str:
        """The image folder below the data root."""
        return "/".join(part for part in (self.folder, self.images) if part)


@dataclass(frozen=True)
class File:
    """A file on the web.

    Args:
        url: Its address.
        to: Folder below the data root that it is put or unpacked into.
        md5: Its checksum, where one is published.
        sha256: The same.
        unpack: Whether it is an archive to unpack.
        inner: Archive inside it that holds what is wanted, by its path in there.
    """

    url: str
    to: str = ""
    md5: str = ""
    sha256: str = ""
    unpack: bool = True
    inner: str = ""

    @property
    def name(self) -> str:
        """The file's own name."""
        return self.url.partition("?")[0].rsplit("/", 1)[-1]


@dataclass(frozen=True)
class HubFile:
    """A file of a Hugging Face repository.

    Args:
        repo: The repository, "owner/name".
        file: Path in it.
        to: Folder below the data root that it is put or unpacked into.
        kind: "dataset" or "model": how the repository is filed.
        unpack: Whether it is an archive to unpack.
    """

    repo: str
    file: str
    to: str = ""
    kind: Literal["dataset", "model"] = "dataset"
    unpack: bool = True


@dataclass(frozen=True)
class TorchFiles:
    """Files that a torchvision class downloads, verifies and unpacks itself.

    Args:
        to: Folder below the data root that it is given as its root.
    """

    to: str = ""


@dataclass(frozen=True)
class Origin:
    """One place that has the whole dataset; the first that works is used.

    Args:
        where: What to call it.
        items: What is fetched, in order.
    """

    where: str
    items: tuple[File | HubFile | TorchFiles, ...]


@dataclass(frozen=True)
class Known:
    """A dataset that adaptkit knows by name.

    Args:
        name: What it is called on the command line.
        title: What its authors call it.
        group: "CoOp suite", "ImageNet variant" or "other".
        classes: How many.
        sizes: Images of (train, val, test); 0 where there is no such split.
        rule: How the split came about.
        reader: How its own index files are read.
        layouts: Where it may lie; the first is the one `data prepare` makes.
        example: An image's path below the image folder, for the tree that is shown.
        needs: Index files below the layout's folder that the reader takes; for datasets with a split file only an own
            split needs them.
        json: Its published split file, "" where there is none.
        json_sha256: Digest of that file, where one is known.
        renames: Class folder to stored class name, where they differ.
        dropped: Class folders that are left out.
        names: Class names to show by stored name, where the files don't say them.
        templates: The prompt template that zero-shot figures are published with.
        torch: torchvision class and its arguments by split, for datasets that torchvision reads.
        origins: Where it can be had, in order.
        steps: What to do by hand where no origin works.
        licence: Of the images.
        citation: Whose it is.
        caveats: What a reader of results must know.
    """

    name: str
    title: str
    group: Literal["CoOp suite", "ImageNet variant", "other"]
    classes: int
    sizes: tuple[int, int, int]
    rule: str
    reader: Reader
    layouts: tuple[Layout, ...]
    example: str
    licence: str
    citation: str
    needs: tuple[str, ...] = ()
    json: str = ""
    json_sha256: str = ""
    renames: Mapping[str, str] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)
    templates: tuple[str, ...] = DEFAULT_TEMPLATES
    torch: tuple[str, Mapping[str, Mapping[str, object]]] | None = None
    origins: tuple[Origin, ...] = ()
    steps: str = ""
    caveats: tuple[str, ...] = ()

    @property
    def own_json(self) -> str:
        """What a split of our own is called; never like the published one."""
        return f"split_adaptkit_{self.name}.json"

    def tree(self, layout: Layout | None = None) -> str:
        """What must lie under the data root, drawn."""
        layout = layout or self.layouts[0]
        index = [self.json] if self.json else list(self.needs)
        images = [f"{part}/{self.example}" for part in layout.parts.values()] or [self.example] * bool(self.example)
        prefix = f"{layout.images}/" if layout.images else ""
        lines = [*index, *(prefix + image for image in images)]
        return "\n".join([f"DATA_ROOT/{layout.folder}/".replace("//", "/"), *(f"    {line}" for line in lines)])


def mirrored(file: str, folder: str, sha256: str = "") -> File:
    """A split file on its public mirror.

    Args:
        file: Its name.
        folder: Folder below the data root that it goes into.
        sha256: Its digest, where one is known.

    Source: datasets sheet, section 3.
    """
    commit = "c7e7e68ae4eeadfab98e7886b2d6c9cf48a7ceb5"
    url = f"https://raw.githubusercontent.com/linzhiqiu/cross_modal_adaptation/{commit}/splits/{file}"
    return File(url, folder, sha256=sha256, unpack=False)


def _coop_zip(file: str) -> Origin:
    """A dataset in CoOp's layout, split file included. Source: datasets sheet, section 7."""
    repo = "zhengli97/prompt_learning_dataset"
    return Origin(f"Hugging Face {repo}", (HubFile(repo, file, kind="model"),))


_VGG = "https://www.robots.ox.ac.uk/~vgg/data"
_TRAIN_VAL = MappingProxyType({"train": "train", "test": "val"})
_50_20_30 = "random 50/20/30 per class"
_NOT_OFFICIAL = "CoOp's split isn't the official one: figures on the official split can't be compared with it"
_OWN_VAL = "no official validation images: an own split keeps 20 % of the training images of each class for it"

_TABLE = (
    # --- the eleven of CoOp's suite --------------------------------------------------------------------------------
    Known(
        name="imagenet",
        title="ImageNet",
        group="CoOp suite",
        classes=1000,
        sizes=(1_281_167, 0, 50_000),
        rule="official train and val; val is the test split",
        reader="imagenet",
        layouts=(
            Layout("imagenet", "images", _TRAIN_VAL),
            Layout("imagenet", "", _TRAIN_VAL),
            Layout("ImageNet", "images", _TRAIN_VAL),
            Layout("ImageNet", "", _TRAIN_VAL),
        ),
        example="n01440764/….JPEG",
        steps=(
            "Sign up at image-net.org, download ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, and unpack them"
            " into one folder per wnid (torchvision.datasets.ImageNet does that). CoOp's classnames.txt may lie beside"
            " images/; without it the names come from open_clip."
        ),
        licence="non-commercial research, ImageNet's terms",
        citation="Russakovsky et al., IJCV 2015",
        caveats=(
            "ImageNet's shots are drawn from sorted file names; CoOp's depended on the machine, so other images",
            "no validation images: the papers chose settings on the test images, adaptkit doesn't",
        ),
    ),
    Known(
        name="caltech101",
        title="Caltech101",
        group="CoOp suite",
        classes=100,
        sizes=(4128, 1649, 2465),
        rule=_50_20_30,
        reader="folders",
        layouts=tuple(Layout(folder, "101_ObjectCategories") for folder in ("caltech-101", "Caltech101", "caltech101")),
        example="accordion/image_0001.jpg",
        json="split_zhou_Caltech101.json",
        json_sha256="52ce83205ff8ff8a1a18119aad6376120ae35c36e783a984bc560cbf10e73fa5",
        renames=MappingProxyType(
            {"Faces": "face", "Leopards": "leopard", "Motorbikes": "motorbike", "airplanes": "airplane"}
        ),
        dropped=("BACKGROUND_Google", "Faces_easy"),
        origins=(
            Origin(
                "data.caltech.edu",
                (
                    File(
                        "https://data.caltech.edu/records/mzrjq-6wc02/files/caltech-101.zip",
                        "caltech-101",
                        md5="3138e1922a9193bfa496528edbbc45d0",
                        inner="caltech-101/101_ObjectCategories.tar.gz",
                    ),
                ),
            ),
            _coop_zip("caltech-101.zip"),
        ),
        licence="CC BY 4.0",
        citation="Fei-Fei et al., CVPR Workshop 2004",
    ),
    Known(
        name="oxford_pets",
        title="OxfordPets",
        group="CoOp suite",
        classes=37,
        sizes=(2944, 736, 3669),
        rule="official trainval, 80/20 per class; official test",
        reader="pets",
        layouts=tuple(Layout(folder, "images") for folder in ("oxford_pets", "OxfordPets", "oxford-iiit-pet")),
        example="Abyssinian_1.jpg",
        needs=("annotations/trainval.txt", "annotations/test.txt"),
        json="split_zhou_OxfordPets.json",
        json_sha256="d7f3ffe65b3919f95132e51422894ae18686b83c331fd8c0adcdc3dc2de6301e",
        templates=("a photo of a {}, a type of pet.",),
        origins=(
            Origin(
                "robots.ox.ac.uk",
                (
                    File(f"{_VGG}/pets/data/images.tar.gz", "oxford_pets", md5="5c4f3ee8e5d25df40f4fd59a7f44e54c"),
                    File(f"{_VGG}/pets/data/annotations.tar.gz", "oxford_pets", md5="95a8c909bbe2e81eed6a22bccdf3f68f"),
                ),
            ),
            _coop_zip("oxford_pets.zip"),
        ),
        licence="CC BY-SA 4.0",
        citation="Parkhi et al., CVPR 2012",
    ),
    Known(
        name="stanford_cars",
        title="StanfordCars",
        group="CoOp suite",
        classes=196,
        sizes=(6509, 1635, 8041),
        rule="official train, 80/20 per class; official test",
        reader="cars",
        layouts=(Layout("stanford_cars"), Layout("StanfordCars")),
        example="cars_train/00001.jpg",
        needs=("devkit/cars_meta.mat", "devkit/cars_train_annos.mat", "cars_test_annos_withlabels.mat"),
        json="split_zhou_StanfordCars.json",
        json_sha256="40acee7aa65c8e4727a32d90e884b7c3f8960b523422317e163f7af65432959d",
        origins=(_coop_zip("stanford_cars.zip"),),
        steps=(
            "The authors' server is gone. Get cars_train/ and cars_test/ from Kaggle, as torchvision's issue 7545 says,"
            " and the split file from the mirror linzhiqiu/cross_modal_adaptation (folder splits)."
        ),
        licence="non-commercial research",
        citation="Krause et al., 3dRR Workshop 2013",
    ),
    Known(
        name="oxford_flowers",
        title="OxfordFlowers",
        group="CoOp suite",
        classes=102,
        sizes=(4093, 1633, 2463),
        rule=_50_20_30,
        reader="flowers",
        layouts=tuple(Layout(folder, "jpg") for folder in ("oxford_flowers", "Flower102", "flowers-102")),
        example="image_00001.jpg",
        needs=("imagelabels.mat", "cat_to_name.json"),
        json="split_zhou_OxfordFlowers.json",
        json_sha256="2f50c42fc1a17ca13c271cb4269b1347bdb43d2be672e34f74a4e4cbfbcca794",
        templates=("a photo of a {}, a type of flower.",),
        origins=(
            Origin(
                "robots.ox.ac.uk",
                (
                    File(
                        f"{_VGG}/flowers/102/102flowers.tgz", "oxford_flowers", md5="52808999861908f626f3c1f4e79d11fa"
                    ),
                    File(
                        f"{_VGG}/flowers/102/imagelabels.mat",
                        "oxford_flowers",
                        md5="e0620be6f572b9609742df49c70aed4d",
                        unpack=False,
                    ),
                    mirrored(
                        "cat_to_name.json",
                        "oxford_flowers",
                        "0469f1ad7fe0072d98155c49aa58649d998edbbe3326229003aa5f7228525236",
                    ),
                ),
            ),
            _coop_zip("oxford_flowers.zip"),
        ),
        licence="not stated",
        citation="Nilsback and Zisserman, ICVGIP 2008",
        caveats=(_NOT_OFFICIAL,),
    ),
    Known(
        name="food101",
        title="Food101",
        group="CoOp suite",
        classes=101,
        sizes=(50_500, 20_200, 30_300),
        rule=_50_20_30,
        reader="folders",
        layouts=(Layout("food-101", "images"), Layout("Food101", "images"), Layout("food101", "images")),
        example="apple_pie/1005649.jpg",
        json="split_zhou_Food101.json",
        templates=("a photo of {}, a type of food.",),
        origins=(
            Origin(
                "data.vision.ee.ethz.ch",
                (File("http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz", md5="85eeb15f3717b99a5da872d97d918f87"),),
            ),
            _coop_zip("food101.zip"),
        ),
        licence="images under their sites' terms, research use",
        citation="Bossard et al., ECCV 2014",
        caveats=(_NOT_OFFICIAL,),
    ),
    Known(
        name="fgvc_aircraft",
        title="FGVCAircraft",
        group="CoOp suite",
        classes=100,
        sizes=(3334, 3333, 3333),
        rule="official variant files",
        reader="aircraft",
        layouts=(
            Layout("fgvc_aircraft", "images"),
            Layout("fgvc_aircraft/data", "images"),
            Layout("fgvc-aircraft-2013b/data", "images"),
            Layout("fgvc_aircraft/fgvc-aircraft-2013b/data", "images"),
        ),
        example="0034309.jpg",
        needs=("variants.txt", "images_variant_train.txt", "images_variant_val.txt", "images_variant_test.txt"),
        templates=("a photo of a {}, a type of aircraft.",),
        origins=(
            Origin("robots.ox.ac.uk", (File(f"{_VGG}/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz", md5=""),)),
            _coop_zip("fgvc_aircraft.zip"),
        ),
        licence="non-commercial research",
        citation="Maji et al., arXiv:1306.5151",
    ),
    Known(
        name="sun397",
        title="SUN397",
        group="CoOp suite",
        classes=397,
        sizes=(15_880, 3970, 19_850),
        rule="Training_01, 80/20 per class; Testing_01 (partition 1 of 10)",
        reader="sun397",
        layouts=(Layout("sun397", "SUN397"), Layout("SUN397", "SUN397"), Layout("SUN397")),
        example="a/abbey/sun_….jpg",
        needs=("ClassName.txt", "Training_01.txt", "Testing_01.txt"),
        json="split_zhou_SUN397.json",
        origins=(_coop_zip("sun397.zip"),),
        steps="The authors' server answers 404 since 2025. Copies are on the Hub and on OpenDataLab.",
        licence="not stated; third-party images",
        citation="Xiao et al., CVPR 2010",
    ),
    Known(
        name="dtd",
        title="DescribableTextures",
        group="CoOp suite",
        classes=47,
        sizes=(2820, 1128, 1692),
        rule=_50_20_30,
        reader="folders",
        layouts=(Layout("dtd", "images"), Layout("DTD", "images"), Layout("dtd", "dtd/images")),
        example="banded/banded_0002.jpg",
        json="split_zhou_DescribableTextures.json",
        json_sha256="f26ebeccd2b58e68d70f07a0dc39fe49bf7b69024bac34396b954dfd87969c38",
        templates=("{} texture.",),
        origins=(
            Origin(
                "robots.ox.ac.uk",
                (File(f"{_VGG}/dtd/download/dtd-r1.0.1.tar.gz", md5="fff73e5086ae6bdbea199a49dfb8a4c1"),),
            ),
            _coop_zip("dtd.zip"),
        ),
        licence="research use",
        citation="Cimpoi et al., CVPR 2014",
        caveats=(_NOT_OFFICIAL,),
    ),
    Known(
        name="eurosat",
        title="EuroSAT",
        group="CoOp suite",
        classes=10,
        sizes=(13_500, 5400, 8100),
        rule=_50_20_30,
        reader="folders",
        layouts=(Layout("eurosat", "2750"), Layout("EuroSAT", "2750"), Layout("EuroSAT_RGB")),
        example="AnnualCrop/AnnualCrop_1.jpg",
        json="split_zhou_EuroSAT.json",
        json_sha256="541503a77d0b26b735d85ec7a3e672804fe0aa466c2e5f07da772cc6c0af8ad2",
        renames=MappingProxyType(
            {
                "AnnualCrop": "Annual Crop Land",
                "HerbaceousVegetation": "Herbaceous Vegetation Land",
                "Highway": "Highway or Road",
                "Industrial": "Industrial Buildings",
                "Pasture": "Pasture Land",
                "PermanentCrop": "Permanent Crop Land",
                "Residential": "Residential Buildings",
                "SeaLake": "Sea or Lake",
            }
        ),
        templates=("a centered satellite photo of {}.",),
        origins=(
            Origin(
                "Hugging Face torchgeo/eurosat",
                (
                    File(
                        "https://huggingface.co/datasets/torchgeo/eurosat/resolve/"
                        "c877bcd43f099cd0196738f714544e355477f3fd/EuroSAT.zip",
                        "eurosat",
                        md5="c8fa014336c82ac7804f0398fcb19387",
                    ),
                ),
            ),
            _coop_zip("eurosat.zip"),
        ),
        licence="MIT",
        citation="Helber et al., JSTARS 2019",
        caveats=("class names are CoOp's; OpenAI's own list gives much higher zero-shot figures",),
    ),
    Known(
        name="ucf101",
        title="UCF101",
        group="CoOp suite",
        classes=101,
        sizes=(7639, 1898, 3783),
        rule="trainlist01, 80/20 per class; testlist01 (split 1 of 3)",
        reader="ucf101",
        layouts=(Layout("ucf101", "UCF-101-midframes"), Layout("UCF101", "UCF-101-midframes")),
        example="Apply_Eye_Makeup/v_ApplyEyeMakeup_g01_c01.jpg",
        needs=(
            "ucfTrainTestlist/classInd.txt",
            "ucfTrainTestlist/trainlist01.txt",
            "ucfTrainTestlist/testlist01.txt",
        ),
        json="split_zhou_UCF101.json",
        json_sha256="d78cb834f7c5792ceaff2c5ee2d7c76a9e4086e48a3a6b01232989d29cbefdd8",
        templates=("a photo of a person doing {}.",),
        origins=(_coop_zip("ucf101.zip"),),
        steps=(
            "CoOp's dataset guide links a zip of the middle frames (Google Drive id 10Jqome3vtUA2keJkNanAiFpgbyC9Hc2O);"
            " unpack it into ucf101/."
        ),
        licence="not stated; research use",
        citation="Soomro et al., arXiv:1212.0402",
    ),
    # --- ImageNet's variants ---------------------------------------------------------------------------------------
    Known(
        name="imagenetv2",
        title="ImageNetV2",
        group="ImageNet variant",
        classes=1000,
        sizes=(0, 0, 10_000),
        rule="matched-frequency images, test only",
        reader="imagenet",
        layouts=(
            Layout("imagenetv2", "imagenetv2-matched-frequency-format-val"),
            Layout("ImageNetV2", "imagenetv2-matched-frequency-format-val"),
            Layout("imagenetv2-matched-frequency-format-val"),
        ),
        example="0/….jpeg",
        origins=(
            Origin(
                "Hugging Face vaishaal/ImageNetV2",
                (HubFile("vaishaal/ImageNetV2", "imagenetv2-matched-frequency.tar.gz", "imagenetv2"),),
            ),
            _coop_zip("imagenetv2.zip"),
        ),
        licence="MIT",
        citation="Recht et al., ICML 2019",
    ),
    Known(
        name="imagenet_sketch",
        title="ImageNet-Sketch",
        group="ImageNet variant",
        classes=1000,
        sizes=(0, 0, 50_889),
        rule="all images, test only",
        reader="imagenet",
        layouts=(
            Layout("imagenet-sketch", "images"),
            Layout("ImageNet-Sketch", "images"),
            Layout("imagenet-sketch", "sketch"),
            Layout("imagenet-sketch"),
            Layout("ImageNet-Sketch"),
        ),
        example="n01440764/sketch_0.JPEG",
        origins=(_coop_zip("imagenet-sketch.zip"),),
        licence="MIT",
        citation="Wang et al., NeurIPS 2019",
    ),
    Known(
        name="imagenet_a",
        title="ImageNet-A",
        group="ImageNet variant",
        classes=200,
        sizes=(0, 0, 7500),
        rule="all images, test only",
        reader="imagenet",
        layouts=(
            Layout("imagenet-adversarial", "imagenet-a"),
            Layout("imagenet-a", "imagenet-a"),
            Layout("imagenet-a"),
        ),
        example="n01498041/….jpg",
        origins=(
            Origin(
                "people.eecs.berkeley.edu",
                (File("https://people.eecs.berkeley.edu/~hendrycks/imagenet-a.tar", "imagenet-adversarial"),),
            ),
            _coop_zip("imagenet-adversarial.zip"),
        ),
        licence="MIT",
        citation="Hendrycks et al., CVPR 2021",
    ),
    Known(
        name="imagenet_r",
        title="ImageNet-R",
        group="ImageNet variant",
        classes=200,
        sizes=(0, 0, 30_000),
        rule="all images, test only",
        reader="imagenet",
        layouts=(
            Layout("imagenet-rendition", "imagenet-r"),
            Layout("imagenet-r", "imagenet-r"),
            Layout("imagenet-r"),
        ),
        example="n01443537/….jpg",
        origins=(
            Origin(
                "people.eecs.berkeley.edu",
                (File("https://people.eecs.berkeley.edu/~hendrycks/imagenet-r.tar", "imagenet-rendition"),),
            ),
            _coop_zip("imagenet-rendition.zip"),
        ),
        licence="MIT",
        citation="Hendrycks et al., ICCV 2021",
    ),
    # --- further ones ----------------------------------------------------------------------------------------------
    Known(
        name="cifar10",
        title="CIFAR-10",
        group="other",
        classes=10,
        sizes=(50_000, 0, 10_000),
        rule="official train and test",
        reader="torchvision",
        layouts=(Layout("cifar10"), Layout("cifar-10"), Layout("")),
        example="",
        needs=("cifar-10-batches-py",),
        torch=("CIFAR10", {"train": {"train": True}, "test": {"train": False}}),
        origins=(Origin("torchvision", (TorchFiles("cifar10"),)),),
        licence="not stated",
        citation="Krizhevsky, 2009",
        caveats=(_OWN_VAL,),
    ),
    Known(
        name="cifar100",
        title="CIFAR-100",
        group="other",
        classes=100,
        sizes=(50_000, 0, 10_000),
        rule="official train and test",
        reader="torchvision",
        layouts=(Layout("cifar100"), Layout("cifar-100"), Layout("")),
        example="",
        needs=("cifar-100-python",),
        torch=("CIFAR100", {"train": {"train": True}, "test": {"train": False}}),
        origins=(Origin("torchvision", (TorchFiles("cifar100"),)),),
        licence="not stated",
        citation="Krizhevsky, 2009",
        caveats=(_OWN_VAL,),
    ),
    Known(
        name="cub200",
        title="CUB-200-2011",
        group="other",
        classes=200,
        sizes=(5994, 0, 5794),
        rule="official train and test",
        reader="cub",
        layouts=(
            Layout("CUB_200_2011", "images"),
            Layout("cub200/CUB_200_2011", "images"),
            Layout("cub200", "images"),
            Layout("cub", "images"),
            Layout("CUB_200_2011/CUB_200_2011", "images"),
        ),
        example="001.Black_footed_Albatross/….jpg",
        needs=("classes.txt", "images.txt", "image_class_labels.txt", "train_test_split.txt"),
        templates=("a photo of a {}, a type of bird.",),
        origins=(
            Origin(
                "data.caltech.edu",
                (
                    File(
                        "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
                        md5="97eceeb196236b17998738112f37df78",
                    ),
                ),
            ),
        ),
        licence="non-commercial research",
        citation="Wah et al., 2011",
        caveats=(_OWN_VAL,),
    ),
    Known(
        name="stanford_dogs",
        title="Stanford Dogs",
        group="other",
        classes=120,
        sizes=(12_000, 0, 8580),
        rule="official train and test",
        reader="dogs",
        layouts=(
            Layout("stanford_dogs", "Images"),
            Layout("StanfordDogs", "Images"),
            Layout("Stanford_Dogs", "Images"),
        ),
        example="n02085620-Chihuahua/n02085620_7.jpg",
        needs=("train_list.mat", "test_list.mat"),
        templates=("a photo of a {}, a type of dog.",),
        origins=(
            Origin(
                "vision.stanford.edu",
                (
                    File("http://vision.stanford.edu/aditya86/ImageNetDogs/images.tar", "stanford_dogs"),
                    File("http://vision.stanford.edu/aditya86/ImageNetDogs/lists.tar", "stanford_dogs"),
                ),
            ),
        ),
        licence="ImageNet's terms",
        citation="Khosla et al., FGVC Workshop 2011",
        caveats=("images are ImageNet's: what was trained on ImageNet has seen them", _OWN_VAL),
    ),
    Known(
        name="country211",
        title="Country211",
        group="other",
        classes=211,
        sizes=(31_650, 10_550, 21_100),
        rule="official train, valid and test: 150, 50 and 100 images per class",
        reader="split-folders",
        layouts=(Layout("country211", "", {"train": "train", "val": "valid", "test": "test"}),),
        example="AD/….jpg",
        names=COUNTRIES,
        templates=("a photo i took in {}.",),
        origins=(
            Origin(
                "openaipublic.azureedge.net",
                (
                    File(
                        "https://openaipublic.azureedge.net/clip/data/country211.tgz",
                        md5="84988d7644798601126c29e9877aab6a",
                    ),
                ),
            ),
        ),
        steps="OpenAI's host may be gone; clip-benchmark/wds_country211 on the Hub holds the same images in shards.",
        licence="Creative Commons, per photo",
        citation="Radford et al., ICML 2021",
    ),
    Known(
        name="gtsrb",
        title="GTSRB",
        group="other",
        classes=43,
        sizes=(26_640, 0, 12_630),
        rule="official training set and final test set",
        reader="gtsrb",
        layouts=(Layout("gtsrb", "GTSRB"), Layout("GTSRB", "GTSRB")),
        example="Training/00000/00000_00000.ppm",
        needs=("GT-final_test.csv", "GTSRB/Training", "GTSRB/Final_Test/Images"),
        names=GTSRB_NAMES,
        templates=('a zoomed in photo of a "{}" traffic sign.',),
        origins=(
            Origin(
                "sid.erda.dk",
                tuple(
                    File(
                        f"https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370/{file}", "gtsrb", md5=md5
                    )
                    for file, md5 in (
                        ("GTSRB-Training_fixed.zip", "513f3c79a4c5141765e10e952eaa2478"),
                        ("GTSRB_Final_Test_Images.zip", "c7e4e6327067d32654124b0fe9e82185"),
                        ("GTSRB_Final_Test_GT.zip", "fe31e9c9270bbcd7b84b7f21a9d9d9e5"),
                    )
                ),
            ),
        ),
        licence="public, research",
        citation="Stallkamp et al., Neural Networks 2012",
        caveats=("class names are ours, by what the signs say", _OWN_VAL),
    ),
    Known(
        name="resisc45",
        title="RESISC45",
        group="other",
        classes=45,
        sizes=(18_900, 6300, 6300),
        rule="the lists of VTAB and torchgeo",
        reader="resisc45",
        layouts=(Layout("resisc45", "NWPU-RESISC45"), Layout("RESISC45", "NWPU-RESISC45"), Layout("resisc45")),
        example="airplane/airplane_001.jpg",
        needs=("resisc45-train.txt", "resisc45-val.txt", "resisc45-test.txt"),
        templates=("satellite imagery of {}.",),
        origins=(
            Origin(
                "Hugging Face torchgeo/resisc45",
                tuple(
                    File(
                        "https://huggingface.co/datasets/torchgeo/resisc45/resolve/"
                        f"a826b44d938a883185f11ebe3d512d38b464312f/{file}",
                        "resisc45",
                        md5=md5,
                        unpack=file.endswith(".zip"),
                    )
                    for file, md5 in (
                        ("NWPU-RESISC45.zip", "75206b2e16446591afa88e2628744886"),
                        ("resisc45-train.txt", "b5a4c05a37de15e4ca886696a85c403e"),
                        ("resisc45-val.txt", "a0770cee4c5ca20b8c32bbd61e114805"),
                        ("resisc45-test.txt", "3dda9e4988b47eb1de9f07993653eb08"),
                    )
                ),
            ),
        ),
        licence="CC BY-NC 4.0",
        citation="Cheng et al., Proceedings of the IEEE 2017",
        caveats=("the CLIP paper used another split (3,150 / 25,200)",),
    ),
    Known(
        name="svhn",
        title="SVHN",
        group="other",
        classes=10,
        sizes=(73_257, 0, 26_032),
        rule="official train and test, without extra",
        reader="torchvision",
        layouts=(Layout("svhn"), Layout("SVHN"), Layout("")),
        example="",
        needs=("train_32x32.mat", "test_32x32.mat"),
        names=MappingProxyType({str(digit): str(digit) for digit in range(10)}),
        templates=('a photo of the number: "{}".',),
        torch=("SVHN", {"train": {"split": "train"}, "test": {"split": "test"}}),
        origins=(Origin("torchvision", (TorchFiles("svhn"),)),),
        licence="non-commercial",
        citation="Netzer et al., NIPS Workshop 2011",
        caveats=(_OWN_VAL,),
    ),
    Known(
        name="stl10",
        title="STL-10",
        group="other",
        classes=10,
        sizes=(5000, 0, 8000),
        rule="official train (all folds) and test",
        reader="torchvision",
        layouts=(Layout("stl10"), Layout("")),
        example="",
        needs=("stl10_binary",),
        torch=("STL10", {"train": {"split": "train"}, "test": {"split": "test"}}),
        origins=(Origin("torchvision", (TorchFiles("stl10"),)),),
        licence="not stated",
        citation="Coates et al., AISTATS 2011",
        caveats=(_OWN_VAL,),
    ),
    Known(
        name="mnist",
        title="MNIST",
        group="other",
        classes=10,
        sizes=(60_000, 0, 10_000),
        rule="official train and test",
        reader="torchvision",
        layouts=(Layout("mnist"), Layout("")),
        example="",
        needs=("MNIST/raw",),
        names=MappingProxyType({str(digit): str(digit) for digit in range(10)}),
        templates=('a photo of the number: "{}".',),
        torch=("MNIST", {"train": {"train": True}, "test": {"train": False}}),
        origins=(Origin("torchvision", (TorchFiles("mnist"),)),),
        licence="CC BY-SA 3.0",
        citation="LeCun et al., Proceedings of the IEEE 1998",
        caveats=(_OWN_VAL,),
    ),
    Known(
        name="pcam",
        title="PatchCamelyon",
        group="other",
        classes=2,
        sizes=(262_144, 32_768, 32_768),
        rule="official train, valid and test",
        reader="torchvision",
        layouts=(Layout(""),),
        example="",
        needs=tuple(
            f"pcam/camelyonpatch_level_2_split_{split}_{what}.h5"
            for split in ("train", "valid", "test")
            for what in ("x", "y")
        ),
        names=MappingProxyType({"0": "lymph node", "1": "lymph node containing metastatic tumor tissue"}),
        templates=("this is a photo of {}",),
        torch=("PCAM", {"train": {"split": "train"}, "val": {"split": "val"}, "test": {"split": "test"}}),
        origins=(Origin("torchvision", (TorchFiles(),)),),
        steps=(
            "torchvision fetches it from Google Drive, which often refuses (quota), and needs the packages h5py and"
            " gdown. The six .h5 files are linked at github.com/basveeling/pcam; unpack them into pcam/."
        ),
        licence="CC0",
        citation="Veeling et al., MICCAI 2018",
    ),
    Known(
        name="fer2013",
        title="FER2013",
        group="other",
        classes=7,
        sizes=(28_709, 0, 7178),
        rule="Kaggle's train and test folders",
        reader="split-folders",
        layouts=(Layout("fer2013", "", {"train": "train", "test": "test"}),),
        example="angry/….jpg",
        templates=("a photo of a {} looking face.",),
        steps="Download the folders of images from Kaggle (dataset fer2013), with a Kaggle account.",
        licence="Kaggle's terms",
        citation="Goodfellow et al., ICONIP 2013",
        caveats=(_OWN_VAL,),
    ),
    Known(
        name="inaturalist_mini",
        title="iNaturalist 2021 mini",
        group="other",
        classes=10_000,
        sizes=(500_000, 0, 100_000),
        rule="official mini training set; official valid is the test split",
        reader="split-folders",
        layouts=tuple(
            Layout(folder, "", {"train": train, "test": test})
            for folder in ("inaturalist_mini", "inaturalist", "")
            for train, test in (("2021_train_mini", "2021_valid"), ("train_mini", "val"))
        ),
        example="00000_Animalia_…_Lumbricus_terrestris/….jpg",
        origins=(
            Origin(
                "ml-inat-competition-datasets.s3.amazonaws.com",
                tuple(
                    File(
                        f"https://ml-inat-competition-datasets.s3.amazonaws.com/2021/{file}",
                        "inaturalist_mini",
                        md5=md5,
                    )
                    for file, md5 in (
                        ("train_mini.tar.gz", "db6ed8330e634445efc8fec83ae81442"),
                        ("val.tar.gz", "f6f6e0e242e3d4c9569ba56400938afc"),
                    )
                ),
            ),
        ),
        licence="non-commercial",
        citation="Van Horn et al., CVPR 2021",
        caveats=("class names are the scientific ones of the folders; give common names as display names", _OWN_VAL),
    ),
    Known(
        name="nabirds",
        title="NABirds",
        group="other",
        classes=555,
        sizes=(23_929, 0, 24_633),
        rule="official train and test",
        reader="cub",
        layouts=(Layout("nabirds", "images"), Layout("NABirds", "images")),
        example="0817/….jpg",
        needs=("classes.txt", "images.txt", "image_class_labels.txt", "train_test_split.txt"),
        templates=("a photo of a {}, a type of bird.",),
        steps="Fill in the request form at dl.allaboutbirds.org/nabirds and unpack nabirds.tar.gz.",
        licence="non-commercial, no redistribution",
        citation="Van Horn et al., CVPR 2015",
        caveats=(_OWN_VAL,),
    ),
)

CATALOGUE: Mapping[str, Known] = MappingProxyType({known.name: known for known in _TABLE})
"""Every known dataset by name."""

BY_FILE: Mapping[str, str] = MappingProxyType(
    {known.json: name for name, known in CATALOGUE.items() if known.json}
    | {known.own_json: name for name, known in CATALOGUE.items() if known.reader != "torchvision"}
)
"""Dataset names by the names of their split files, the published ones and our own."""
